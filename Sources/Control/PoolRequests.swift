// The questions about the volumes of a pool, mapped or not, and about the daemon itself.

/// Create a volume, all zeros.
package struct CreateRequest: ControlRequest {
    package typealias Answer = PoolVolume
    package static let command = Command.create

    package var volume: String
    package var config: String
    /// Bytes.
    package var size: UInt64
    /// Bytes: 512 or 4096.
    package var blockSize: UInt32

    package init(volume: String, config: String, size: UInt64, blockSize: UInt32) {
        self.volume = volume
        self.config = config
        self.size = size
        self.blockSize = blockSize
    }

    package enum CodingKeys: String, CodingKey {
        case volume, config, size
        case blockSize = "block_size"
    }
}

/// Delete a volume and its data; refused while it is mapped.
package struct DeleteRequest: ControlRequest {
    package typealias Answer = Done
    package static let command = Command.delete

    package var volume: String
    package var config: String
    /// Its snapshots too; refused when it has some and this is not set.
    package var snapshots: Bool

    package init(volume: String, config: String, snapshots: Bool = false) {
        self.volume = volume
        self.config = config
        self.snapshots = snapshots
    }

    package enum CodingKeys: String, CodingKey { case volume, config, snapshots }

    /// A flag that is left out is not set.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decode(String.self, forKey: .config)
        snapshots = try fields.decodeIfPresent(Bool.self, forKey: .snapshots) ?? false
    }
}

/// The volumes of one pool, or of every pool of the configuration.
package struct VolumesRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        package var volumes: [PoolVolume]
        /// The pools that could not be listed, when every pool was asked for.
        package var problems: [PoolProblem]

        package init(volumes: [PoolVolume], problems: [PoolProblem]) {
            self.volumes = volumes
            self.problems = problems
        }
    }
    package static let command = Command.volumes

    /// Nil: every pool.
    package var pool: String?
    package var config: String

    package init(pool: String?, config: String) {
        self.pool = pool
        self.config = config
    }
}

/// A volume as its pool knows it.
package struct PoolVolume: Codable, Sendable, Equatable {
    /// `pool/volume`.
    package var volume: String
    /// In hex, as in `0x3ff7000000`.
    package var volumeID: String
    /// Bytes.
    package var size: UInt64
    /// Bytes.
    package var blockSize: UInt32
    /// Seconds since 1970; nil when its store does not say.
    package var created: Int64?

    package init(volume: String, id: UInt64, size: UInt64, blockSize: UInt32, created: Int64?) {
        self.volume = volume
        volumeID = hexadecimal(id)
        self.size = size
        self.blockSize = blockSize
        self.created = created
    }

    package enum CodingKeys: String, CodingKey {
        case volume, size, created
        case volumeID = "vol_id"
        case blockSize = "block_size"
    }
}

/// A pool that could not be listed, and why.
package struct PoolProblem: Codable, Sendable, Equatable {
    package var pool: String
    package var error: ControlError

    package init(pool: String, error: ControlError) {
        self.pool = pool
        self.error = error
    }
}

/// Who answers on the socket.
package struct VersionRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        package var version: String
        /// The daemon's process id.
        package var pid: Int32

        package init(version: String, pid: Int32) {
            self.version = version
            self.pid = pid
        }
    }
    package static let command = Command.version
    package init() {}
}

/// A volume id as the documented list prints it.
func hexadecimal(_ id: UInt64) -> String { "0x" + String(id, radix: 16) }
