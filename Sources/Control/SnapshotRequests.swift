// The questions about snapshots of volumes, mapped or not.

/// Make a snapshot of all that was acknowledged before; also of a mapped volume.
package struct CreateSnapshotRequest: ControlRequest {
    package typealias Answer = PoolSnapshot
    package static let command = Command.createSnapshot

    /// `pool/volume@snapshot`.
    package var snapshot: String
    /// As in ``UnmapRequest/config``.
    package var config: String?
    /// As in ``ResizeRequest/defaultConfig``.
    package var defaultConfig: String?

    package init(snapshot: String, config: String?, defaultConfig: String?) {
        self.snapshot = snapshot
        self.config = config
        self.defaultConfig = defaultConfig
    }

    package enum CodingKeys: String, CodingKey {
        case snapshot, config
        case defaultConfig = "default_config"
    }
}

/// Delete a snapshot; refused while it is mapped.
package struct DeleteSnapshotRequest: ControlRequest {
    package typealias Answer = Done
    package static let command = Command.deleteSnapshot

    /// `pool/volume@snapshot`.
    package var snapshot: String
    /// As in ``UnmapRequest/config``.
    package var config: String?
    /// As in ``ResizeRequest/defaultConfig``.
    package var defaultConfig: String?

    package init(snapshot: String, config: String?, defaultConfig: String?) {
        self.snapshot = snapshot
        self.config = config
        self.defaultConfig = defaultConfig
    }

    package enum CodingKeys: String, CodingKey {
        case snapshot, config
        case defaultConfig = "default_config"
    }
}

/// Give a volume the contents and the size of one of its snapshots; refused while it is mapped.
package struct RollbackRequest: ControlRequest {
    package typealias Answer = Done
    package static let command = Command.rollback

    /// `pool/volume@snapshot`.
    package var snapshot: String
    /// As in ``UnmapRequest/config``.
    package var config: String?
    /// As in ``ResizeRequest/defaultConfig``.
    package var defaultConfig: String?

    package init(snapshot: String, config: String?, defaultConfig: String?) {
        self.snapshot = snapshot
        self.config = config
        self.defaultConfig = defaultConfig
    }

    package enum CodingKeys: String, CodingKey {
        case snapshot, config
        case defaultConfig = "default_config"
    }
}

/// The snapshots of a volume, oldest first.
package struct SnapshotsRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        package var snapshots: [PoolSnapshot]
        package init(snapshots: [PoolSnapshot]) { self.snapshots = snapshots }
    }
    package static let command = Command.snapshots

    package var volume: String
    /// As in ``UnmapRequest/config``.
    package var config: String?
    /// As in ``ResizeRequest/defaultConfig``.
    package var defaultConfig: String?

    package init(volume: String, config: String?, defaultConfig: String?) {
        self.volume = volume
        self.config = config
        self.defaultConfig = defaultConfig
    }

    package enum CodingKeys: String, CodingKey {
        case volume, config
        case defaultConfig = "default_config"
    }
}

/// Make a volume that begins with the contents of a snapshot, in the same pool.
package struct CloneRequest: ControlRequest {
    package typealias Answer = PoolVolume
    package static let command = Command.clone

    /// `pool/volume@snapshot`.
    package var snapshot: String
    /// `pool/volume`, the new one.
    package var volume: String
    package var config: String

    package init(snapshot: String, volume: String, config: String) {
        self.snapshot = snapshot
        self.volume = volume
        self.config = config
    }
}

/// A snapshot as its pool knows it.
package struct PoolSnapshot: Codable, Sendable, Equatable {
    /// `pool/volume@snapshot`.
    package var snapshot: String
    /// In hex, as a volume's.
    package var id: String
    /// Bytes.
    package var size: UInt64
    /// Seconds since 1970.
    package var created: Int64

    package init(snapshot: String, id: UInt64, size: UInt64, created: Int64) {
        self.snapshot = snapshot
        self.id = hexadecimal(id)
        self.size = size
        self.created = created
    }

    package enum CodingKeys: String, CodingKey {
        case snapshot, size, created
        case id = "snap_id"
    }
}

/// The output of `qbd snapshot list`, in the manner of ``VolumeTable``.
package enum SnapshotTable {
    package static func text(_ snapshots: [PoolSnapshot]) -> String {
        let rows = snapshots.map { [$0.id, $0.snapshot, String($0.size), Calendar.text($0.created)] }
        return Columns.text([["snap_id", "snapshot", "size", "created"]] + rows)
    }
}
