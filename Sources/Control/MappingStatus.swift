/// All that is known of one mapped volume.
package struct MappingStatus: Codable, Sendable, Equatable {
    package var mapping: MappingRecord
    package var counters: Counters
    package var heldBack: HeldBack
    package var latency: Latency
    /// Of a cluster's volume: who says where its shards are; nil, and then absent, of others.
    package var conductor: String?
    /// Of a cluster's volume, by index; nil, and then absent, of others.
    package var shards: [Shard]?
    /// Of a cluster's volume.
    package var stores: [Store]?
    /// Why I/O waits for its store, in one sentence; nil, and then absent, when it does not.
    package var waits: String?
    /// What its pool lies on; nil, and then absent, where that is not known.
    package var room: PoolRoom?

    package init(
        mapping: MappingRecord, counters: Counters, heldBack: HeldBack, latency: Latency, conductor: String? = nil,
        shards: [Shard]? = nil, stores: [Store]? = nil, waits: String? = nil, room: PoolRoom? = nil
    ) {
        self.room = room
        self.conductor = conductor
        self.shards = shards
        self.stores = stores
        self.waits = waits
        self.mapping = mapping
        self.counters = counters
        self.heldBack = heldBack
        self.latency = latency
    }

    /// Requests that are not let through to the store.
    package struct HeldBack: Codable, Sendable, Equatable {
        package var requests: UInt64
        /// Milliseconds since the oldest of them arrived.
        package var oldest: UInt64
        /// `suspended` or `throttle`; nil, and then absent, when there are none.
        package var by: String?

        package init(requests: UInt64, oldest: UInt64, by: String? = nil) {
            self.requests = requests
            self.oldest = oldest
            self.by = by
        }

        package enum CodingKeys: String, CodingKey {
            case requests, by
            case oldest = "oldest_ms"
        }
    }

    /// 64 GiB of a cluster's volume.
    package struct Shard: Codable, Sendable, Equatable {
        package var index: Int
        /// Addresses of those that have it, the primary's first.
        package var stores: [String]
        /// The one that is asked; nil, and then absent, when there is none.
        package var store: String?

        package init(index: Int, stores: [String], store: String?) {
            self.index = index
            self.stores = stores
            self.store = store
        }
    }

    /// A store of a cluster, as this volume sees it.
    package struct Store: Codable, Sendable, Equatable {
        package var address: String
        /// `unused`, `connecting`, `connected` or `lost`.
        package var state: String
        package var connections: Int
        package var inFlight: Int
        /// Why a connection was lost; nil, and then absent, when none is.
        package var trouble: String?

        package init(address: String, state: String, connections: Int, inFlight: Int, trouble: String?) {
            self.address = address
            self.state = state
            self.connections = connections
            self.inFlight = inFlight
            self.trouble = trouble
        }

        package enum CodingKeys: String, CodingKey {
            case address, state, connections, trouble
            case inFlight = "in_flight"
        }
    }

    /// What was done since the volume was mapped.
    package struct Counters: Codable, Sendable, Equatable {
        package var reads: UInt64
        package var writes: UInt64
        package var flushes: UInt64
        /// Trims and writes of zeros.
        package var trims: UInt64
        package var readBytes: UInt64
        package var writtenBytes: UInt64
        /// Requests that were answered with an error.
        package var errors: UInt64
        /// Requests that took longer than `slow_io_ms` says.
        package var slow: UInt64
        /// Requests without an answer at the moment.
        package var inFlight: UInt64

        package init(
            reads: UInt64, writes: UInt64, flushes: UInt64, trims: UInt64, readBytes: UInt64, writtenBytes: UInt64,
            errors: UInt64, slow: UInt64, inFlight: UInt64
        ) {
            self.reads = reads
            self.writes = writes
            self.flushes = flushes
            self.trims = trims
            self.readBytes = readBytes
            self.writtenBytes = writtenBytes
            self.errors = errors
            self.slow = slow
            self.inFlight = inFlight
        }

        package enum CodingKeys: String, CodingKey {
            case reads, writes, flushes, trims, errors, slow
            case readBytes = "read_bytes"
            case writtenBytes = "written_bytes"
            case inFlight = "in_flight"
        }
    }

    /// How long requests took in the daemon, from the arrival of the request to its answer.
    package struct Latency: Codable, Sendable, Equatable {
        package var reads: Percentiles
        package var writes: Percentiles
        package var flushes: Percentiles

        package init(reads: Percentiles, writes: Percentiles, flushes: Percentiles) {
            self.reads = reads
            self.writes = writes
            self.flushes = flushes
        }
    }

    /// Microseconds; all 0 when nothing was counted.
    package struct Percentiles: Codable, Sendable, Equatable {
        package var count: UInt64
        package var p50: Double
        package var p90: Double
        package var p99: Double
        package var p999: Double
        package var max: Double

        package init(count: UInt64, p50: Double, p90: Double, p99: Double, p999: Double, max: Double) {
            self.count = count
            self.p50 = p50
            self.p90 = p90
            self.p99 = p99
            self.p999 = p999
            self.max = max
        }

        package enum CodingKeys: String, CodingKey {
            case count
            case p50 = "p50_us"
            case p90 = "p90_us"
            case p99 = "p99_us"
            case p999 = "p999_us"
            case max = "max_us"
        }
    }

    package enum CodingKeys: String, CodingKey {
        case counters, latency, conductor, shards, stores, waits
        case room = "pool"
        case heldBack = "held_back"
    }

    // The fields of the list lie flat beside the rest.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        mapping = try MappingRecord(from: decoder)
        counters = try fields.decode(Counters.self, forKey: .counters)
        heldBack = try fields.decode(HeldBack.self, forKey: .heldBack)
        latency = try fields.decode(Latency.self, forKey: .latency)
        conductor = try fields.decodeIfPresent(String.self, forKey: .conductor)
        shards = try fields.decodeIfPresent([Shard].self, forKey: .shards)
        stores = try fields.decodeIfPresent([Store].self, forKey: .stores)
        waits = try fields.decodeIfPresent(String.self, forKey: .waits)
        room = try fields.decodeIfPresent(PoolRoom.self, forKey: .room)
    }

    package func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try mapping.encode(to: encoder)
        try fields.encode(counters, forKey: .counters)
        try fields.encode(heldBack, forKey: .heldBack)
        try fields.encode(latency, forKey: .latency)
        try fields.encodeIfPresent(conductor, forKey: .conductor)
        try fields.encodeIfPresent(shards, forKey: .shards)
        try fields.encodeIfPresent(stores, forKey: .stores)
        try fields.encodeIfPresent(waits, forKey: .waits)
        try fields.encodeIfPresent(room, forKey: .room)
    }
}
