/// A mapped volume: one line of the documented list, and more.
package struct MappingRecord: Codable, Sendable, Equatable {
    /// Counts up from 0 in the order of mapping; not used again while the volume is mapped.
    package var deviceID: UInt32
    /// In hex, as in `0x3ff7000000`.
    package var volumeID: String
    /// Without `/dev/`; `-` for a volume that is only exported over NBD.
    package var device: String
    /// `pool/volume`.
    package var volume: String
    /// The configuration it was mapped with.
    package var config: String
    package var limits: Limits
    /// `normal`, `suspended`, `error` or `discard`.
    package var state: String
    /// When it got into that state, in seconds since 1970.
    package var since: Int64
    /// How well it does: `idle`, `active`, `degraded`, `slow`, `reconnecting`, `failed` or `read-only`.
    package var health: String
    /// When that began, in seconds since 1970.
    package var healthSince: Int64
    /// From when on every flush fails, in seconds since 1970; nil, and then absent, while they do not.
    package var flushesFailSince: Int64?
    /// Bytes.
    package var size: UInt64
    /// Bytes.
    package var blockSize: UInt32
    /// Where the bytes live: `local`, `memory`, `tcp` or `rdma`.
    package var transport: String
    package var readOnly: Bool
    /// Where an NBD client finds it.
    package var uri: String
    /// NBD clients connected at the moment.
    package var connections: Int

    package init(
        deviceID: UInt32, id: UInt64, device: String, volume: String, config: String, limits: Limits, state: String,
        since: Int64, health: String, healthSince: Int64, size: UInt64, blockSize: UInt32, transport: String,
        readOnly: Bool, uri: String, connections: Int, flushesFailSince: Int64? = nil
    ) {
        self.flushesFailSince = flushesFailSince
        self.deviceID = deviceID
        volumeID = hexadecimal(id)
        self.device = device
        self.volume = volume
        self.config = config
        self.limits = limits
        self.state = state
        self.since = since
        self.health = health
        self.healthSince = healthSince
        self.size = size
        self.blockSize = blockSize
        self.transport = transport
        self.readOnly = readOnly
        self.uri = uri
        self.connections = connections
    }

    package enum CodingKeys: String, CodingKey {
        case device, volume, config, state, since, health, size, uri, connections
        case healthSince = "health_since"
        case flushesFailSince = "flushes_fail_since"
        case deviceID = "dev_id"
        case volumeID = "vol_id"
        case blockSize = "block_size"
        case transport = "protocol"
        case readOnly = "read_only"
    }

    // The limits lie flat beside the other fields, under the names of the list's columns.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        deviceID = try fields.decode(UInt32.self, forKey: .deviceID)
        volumeID = try fields.decode(String.self, forKey: .volumeID)
        device = try fields.decode(String.self, forKey: .device)
        volume = try fields.decode(String.self, forKey: .volume)
        config = try fields.decode(String.self, forKey: .config)
        limits = try Limits(from: decoder)
        state = try fields.decode(String.self, forKey: .state)
        since = try fields.decode(Int64.self, forKey: .since)
        health = try fields.decode(String.self, forKey: .health)
        healthSince = try fields.decode(Int64.self, forKey: .healthSince)
        flushesFailSince = try fields.decodeIfPresent(Int64.self, forKey: .flushesFailSince)
        size = try fields.decode(UInt64.self, forKey: .size)
        blockSize = try fields.decode(UInt32.self, forKey: .blockSize)
        transport = try fields.decode(String.self, forKey: .transport)
        readOnly = try fields.decode(Bool.self, forKey: .readOnly)
        uri = try fields.decode(String.self, forKey: .uri)
        connections = try fields.decode(Int.self, forKey: .connections)
    }

    package func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encode(deviceID, forKey: .deviceID)
        try fields.encode(volumeID, forKey: .volumeID)
        try fields.encode(device, forKey: .device)
        try fields.encode(volume, forKey: .volume)
        try fields.encode(config, forKey: .config)
        try limits.encode(to: encoder)
        try fields.encode(state, forKey: .state)
        try fields.encode(since, forKey: .since)
        try fields.encode(health, forKey: .health)
        try fields.encode(healthSince, forKey: .healthSince)
        try fields.encodeIfPresent(flushesFailSince, forKey: .flushesFailSince)
        try fields.encode(size, forKey: .size)
        try fields.encode(blockSize, forKey: .blockSize)
        try fields.encode(transport, forKey: .transport)
        try fields.encode(readOnly, forKey: .readOnly)
        try fields.encode(uri, forKey: .uri)
        try fields.encode(connections, forKey: .connections)
    }
}
