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
    /// Copies of its data, 1 to 3; nil, and then absent, leaves that to the pool.
    package var replicas: Int?

    package init(volume: String, config: String, size: UInt64, blockSize: UInt32, replicas: Int? = nil) {
        self.volume = volume
        self.config = config
        self.size = size
        self.blockSize = blockSize
        self.replicas = replicas
    }

    package enum CodingKeys: String, CodingKey {
        case volume, config, size, replicas
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
    /// Also when it is damaged and may still have good data.
    package var force: Bool

    package init(volume: String, config: String, snapshots: Bool = false, force: Bool = false) {
        self.volume = volume
        self.config = config
        self.snapshots = snapshots
        self.force = force
    }

    package enum CodingKeys: String, CodingKey { case volume, config, snapshots, force }

    /// A flag that is left out is not set.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decode(String.self, forKey: .config)
        snapshots = try fields.decodeIfPresent(Bool.self, forKey: .snapshots) ?? false
        force = try fields.decodeIfPresent(Bool.self, forKey: .force) ?? false
    }
}

/// The volumes of one pool, or of every pool of the configuration.
package struct VolumesRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        package var volumes: [PoolVolume]
        /// The pools that could not be listed, when every pool was asked for.
        package var problems: [PoolProblem]
        /// What is there and cannot be read.
        package var damaged: [DamagedPoolVolume]
        /// The pools of which that is known.
        package var spaces: [PoolRoom]

        package init(
            volumes: [PoolVolume], problems: [PoolProblem], damaged: [DamagedPoolVolume] = [], spaces: [PoolRoom] = []
        ) {
            self.volumes = volumes
            self.problems = problems
            self.damaged = damaged
            self.spaces = spaces
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
    /// Why it cannot be read, all numbers being 0 then; nil, and then absent, of one that can. In the command's output
    /// alone.
    package var damaged: String?
    /// Its pool is nearly full; nil, and then absent, when it is not. In the command's output alone.
    package var poolNearlyFull: Bool?

    package init(
        volume: String, id: UInt64, size: UInt64, blockSize: UInt32, created: Int64?, damaged: String? = nil
    ) {
        self.damaged = damaged
        self.volume = volume
        volumeID = hexadecimal(id)
        self.size = size
        self.blockSize = blockSize
        self.created = created
    }

    package enum CodingKeys: String, CodingKey {
        case volume, size, created, damaged
        case poolNearlyFull = "pool_nearly_full"
        case volumeID = "vol_id"
        case blockSize = "block_size"
    }
}

/// What is in a pool under a volume's name and cannot be read, and why.
package struct DamagedPoolVolume: Codable, Sendable, Equatable {
    /// `pool/volume`.
    package var volume: String
    package var reason: String

    package init(volume: String, reason: String) {
        self.volume = volume
        self.reason = reason
    }
}

/// How much there is of what a pool lies on.
package struct PoolRoom: Codable, Sendable, Equatable {
    package var pool: String
    /// Bytes.
    package var total: UInt64
    /// Bytes.
    package var free: UInt64
    /// Writes will fail before long.
    package var nearlyFull: Bool

    package init(pool: String, total: UInt64, free: UInt64, nearlyFull: Bool) {
        self.pool = pool
        self.total = total
        self.free = free
        self.nearlyFull = nearlyFull
    }

    package enum CodingKeys: String, CodingKey {
        case pool, total, free
        case nearlyFull = "nearly_full"
    }

    /// For people: nil unless it is nearly full.
    package var warning: String? {
        guard nearlyFull else { return nil }
        return "the pool \(pool) is nearly full: \(StatusText.size(free)) of \(StatusText.size(total)) are free;"
            + " delete volumes or snapshots, or make room otherwise"
    }
}

extension VolumesRequest.Answer {
    /// What `qbd volumes --json` prints: each volume, damaged ones among them, by name.
    package var rows: [PoolVolume] {
        let full = Set(spaces.filter(\.nearlyFull).map(\.pool))
        let rows =
            volumes
            + damaged.map {
                PoolVolume(volume: $0.volume, id: 0, size: 0, blockSize: 0, created: nil, damaged: $0.reason)
            }
        guard !full.isEmpty || !damaged.isEmpty else { return rows }
        return rows.map { row in
            var row = row
            if full.contains(String(row.volume.prefix { $0 != "/" })) { row.poolNearlyFull = true }
            return row
        }.sorted { $0.volume < $1.volume }
    }

    /// What is to be said beside them, a line each.
    package var remarks: [String] {
        damaged.map { Self.harmless("\($0.volume) is damaged: \($0.reason)") } + spaces.compactMap(\.warning)
    }

    /// Names of files may hold anything, also what a terminal obeys.
    private static func harmless(_ text: String) -> String {
        text.unicodeScalars.reduce(into: "") { text, scalar in
            switch scalar.properties.generalCategory {
            case .control, .format, .lineSeparator, .paragraphSeparator, .surrogate, .privateUse, .unassigned:
                text += "\\u{\(String(scalar.value, radix: 16))}"
            default: text.unicodeScalars.append(scalar)
            }
        }
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
