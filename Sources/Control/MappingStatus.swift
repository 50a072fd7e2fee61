/// All that is known of one mapped volume.
package struct MappingStatus: Codable, Sendable, Equatable {
    package var mapping: MappingRecord
    package var counters: Counters
    package var heldBack: HeldBack
    package var latency: Latency

    package init(mapping: MappingRecord, counters: Counters, heldBack: HeldBack, latency: Latency) {
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
        case counters, latency
        case heldBack = "held_back"
    }

    // The fields of the list lie flat beside the rest.
    package init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        mapping = try MappingRecord(from: decoder)
        counters = try fields.decode(Counters.self, forKey: .counters)
        heldBack = try fields.decode(HeldBack.self, forKey: .heldBack)
        latency = try fields.decode(Latency.self, forKey: .latency)
    }

    package func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try mapping.encode(to: encoder)
        try fields.encode(counters, forKey: .counters)
        try fields.encode(heldBack, forKey: .heldBack)
        try fields.encode(latency, forKey: .latency)
    }
}
