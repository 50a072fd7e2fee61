// The questions about mapped volumes. `volume` is always `[<tcp|rdma>://]pool/volume` as the user wrote it; the daemon
// checks it again. `config` is an absolute path on the daemon's host, read by the daemon.

/// Map a volume; asking for what is mapped already in the same way is a success that changes nothing.
package struct MapRequest: ControlRequest {
    package typealias Answer = MappingRecord
    package static let command = Command.map

    package var volume: String
    package var config: String
    package var readOnly: Bool
    /// Serve it over NBD, without a kernel device.
    package var export: Bool
    /// `/dev/nbdX`; nil for any that is free.
    package var device: String?
    /// What is not named is unlimited. When the volume is mapped already, its limits stay as they are.
    package var limits: ThrottleArgument
    /// The number it gets if that is free, else the smallest that is.
    package var deviceID: UInt32?

    package init(
        volume: String, config: String, readOnly: Bool, export: Bool, device: String? = nil,
        limits: ThrottleArgument = ThrottleArgument(), deviceID: UInt32? = nil
    ) {
        self.deviceID = deviceID
        self.volume = volume
        self.limits = limits
        self.config = config
        self.readOnly = readOnly
        self.export = export
        self.device = device
    }

    package enum CodingKeys: String, CodingKey {
        case volume, config, export, device
        case readOnly = "read_only"
        case deviceID = "dev_id"
    }

    /// A flag that is left out is not set.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decode(String.self, forKey: .config)
        deviceID = try fields.decodeIfPresent(UInt32.self, forKey: .deviceID)
        readOnly = try fields.decodeIfPresent(Bool.self, forKey: .readOnly) ?? false
        export = try fields.decodeIfPresent(Bool.self, forKey: .export) ?? false
        device = try fields.decodeIfPresent(String.self, forKey: .device)
        limits = try ThrottleArgument(from: decoder)
    }

    package func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encode(volume, forKey: .volume)
        try fields.encode(config, forKey: .config)
        try fields.encode(readOnly, forKey: .readOnly)
        try fields.encode(export, forKey: .export)
        try fields.encodeIfPresent(device, forKey: .device)
        try fields.encodeIfPresent(deviceID, forKey: .deviceID)
        try limits.encode(to: encoder)
    }
}

/// Unmap a volume.
package struct UnmapRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        /// Who lost the device by force.
        package var warning: String?
        package init(warning: String? = nil) { self.warning = warning }
    }
    package static let command = Command.unmap

    package var volume: String
    /// Nil: with whatever configuration it was mapped. Otherwise it must be the one it was mapped with.
    package var config: String?
    /// Also when it is in use: I/O of its users fails.
    package var force: Bool

    package init(volume: String, config: String?, force: Bool = false) {
        self.volume = volume
        self.config = config
        self.force = force
    }

    package enum CodingKeys: String, CodingKey { case volume, config, force }

    /// A flag that is left out is not set.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decodeIfPresent(String.self, forKey: .config)
        force = try fields.decodeIfPresent(Bool.self, forKey: .force) ?? false
    }
}

/// Every mapped volume.
package struct ListRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        package var mappings: [MappingRecord]
        package init(mappings: [MappingRecord]) { self.mappings = mappings }
    }
    package static let command = Command.list
    package init() {}
}

/// All that is known of one mapped volume.
package struct InfoRequest: ControlRequest {
    package typealias Answer = MappingStatus
    package static let command = Command.info

    package var volume: String
    /// As in ``UnmapRequest/config``.
    package var config: String?

    package init(volume: String, config: String?) {
        self.volume = volume
        self.config = config
    }
}

/// Give a mapped volume fresh connections.
package struct RemapRequest: ControlRequest {
    package typealias Answer = Done
    package static let command = Command.remap

    package var volume: String
    package var config: String?

    package init(volume: String, config: String?) {
        self.volume = volume
        self.config = config
    }
}

/// Change some of a mapped volume's limits; nil leaves one as it is, 0 removes it.
package struct SetThrottleRequest: ControlRequest {
    package typealias Answer = Limits
    package static let command = Command.setThrottle

    package var volume: String
    package var config: String?
    package var limits: ThrottleArgument

    package init(volume: String, config: String?, limits: ThrottleArgument) {
        self.volume = volume
        self.config = config
        self.limits = limits
    }

    package enum CodingKeys: String, CodingKey { case volume, config }

    // The limits lie flat beside the other fields.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decodeIfPresent(String.self, forKey: .config)
        limits = try ThrottleArgument(from: decoder)
    }

    package func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encode(volume, forKey: .volume)
        try fields.encodeIfPresent(config, forKey: .config)
        try limits.encode(to: encoder)
    }
}

/// Hold back new I/O; answered when none is in flight any more.
package struct SuspendRequest: ControlRequest {
    package typealias Answer = Done
    package static let command = Command.suspend

    package static let defaultTimeout: UInt64 = 30

    package var volume: String
    package var config: String?
    /// Seconds the I/O in flight may take, 1...86400; nil is ``defaultTimeout``. When they have passed, the volume is as
    /// it was before.
    package var timeout: UInt64?

    package init(volume: String, config: String?, timeout: UInt64? = nil) {
        self.volume = volume
        self.config = config
        self.timeout = timeout
    }
}

/// Decide what becomes of held-back and later I/O.
package struct ResumeRequest: ControlRequest {
    package struct Answer: Codable, Sendable, Equatable {
        /// That it is not written down.
        package var warning: String?
        package init(warning: String? = nil) { self.warning = warning }
    }
    package static let command = Command.resume

    package var volume: String
    package var config: String?
    package var mode: ResumeMode

    package init(volume: String, config: String?, mode: ResumeMode) {
        self.volume = volume
        self.config = config
        self.mode = mode
    }
}

/// Grow a volume, mapped or not, and its device.
package struct ResizeRequest: ControlRequest {
    package typealias Answer = PoolVolume
    package static let command = Command.resize

    package var volume: String
    /// As in ``UnmapRequest/config``.
    package var config: String?
    /// The configuration whose volume is meant when it is not mapped and none was named; nil: it must be mapped.
    package var defaultConfig: String?
    /// Bytes; nil takes over the size the volume has at its store.
    package var size: UInt64?
    /// Read the device's partition table again.
    package var rescanPartitions: Bool

    package init(
        volume: String, config: String?, defaultConfig: String? = nil, size: UInt64?, rescanPartitions: Bool = false
    ) {
        self.volume = volume
        self.config = config
        self.defaultConfig = defaultConfig
        self.size = size
        self.rescanPartitions = rescanPartitions
    }

    package enum CodingKeys: String, CodingKey {
        case volume, config, size
        case defaultConfig = "default_config"
        case rescanPartitions = "rescan_partitions"
    }

    /// A flag that is left out is not set.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decodeIfPresent(String.self, forKey: .config)
        defaultConfig = try fields.decodeIfPresent(String.self, forKey: .defaultConfig)
        size = try fields.decodeIfPresent(UInt64.self, forKey: .size)
        rescanPartitions = try fields.decodeIfPresent(Bool.self, forKey: .rescanPartitions) ?? false
    }
}
