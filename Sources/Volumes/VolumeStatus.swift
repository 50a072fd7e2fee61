import Backend

/// Counts since the volume was mapped.
package struct VolumeCounters: Sendable, Equatable {
    package var reads: UInt64 = 0
    package var writes: UInt64 = 0
    package var flushes: UInt64 = 0
    package var trims: UInt64 = 0
    package var writeZeroes: UInt64 = 0
    /// Cache and block-status requests.
    package var others: UInt64 = 0
    package var bytesRead: UInt64 = 0
    package var bytesWritten: UInt64 = 0
    /// Requests answered with an error.
    package var errors: UInt64 = 0
    /// Requests that took too long.
    package var slow: UInt64 = 0
}

/// A mapping, as the list shows it.
package struct MappedVolume: Sendable {
    /// The smallest number that was free when the volume was mapped.
    package let deviceID: UInt32
    package let pool: String
    package let record: VolumeRecord
    /// The kernel device without `/dev/`; nil while it is only exported.
    package let device: String?
    /// Absolute path of the configuration it was mapped with.
    package let configPath: String
    package let readOnly: Bool
    /// "local", "memory".
    package let protocolName: String
    package let uri: String
    package let limits: ThrottleLimits
    package let state: GateState
    package let health: HealthState
    /// Seconds since 1970 when that was entered.
    package let healthSince: Int64
    /// Seconds since 1970 from when on every flush fails; nil while they do not.
    package let flushesFailSince: Int64?
    /// Seconds since 1970 when the state was entered.
    package let since: Int64
    /// NBD clients connected.
    package let connections: Int

    package var name: String { "\(pool)/\(record.volume)" }
}

/// What is in a pool.
package struct PoolContents: Sendable {
    package let volumes: [VolumeRecord]
    package let damaged: [DamagedVolume]
    /// Nil where that is not known.
    package let space: PoolSpace?
}

/// A mapping, as `info` shows it.
package struct VolumeStatus: Sendable {
    package let mapping: MappedVolume
    package let counters: VolumeCounters
    /// Requests taken and not yet answered.
    package let inFlight: Int
    package let heldBack: HeldBack
    package let readLatency: LatencySummary
    package let writeLatency: LatencySummary
    package let flushLatency: LatencySummary
    /// "unix" or the address of each client.
    package let clients: [String]
    /// Nil unless the volume is a cluster's.
    package let cluster: ClusterReport?
    /// Why I/O waits for its store, in one sentence; nil when it does not.
    package let waits: String?
    /// What its pool lies on, as it was lately; nil where that is not known.
    package let space: PoolSpace?
}
