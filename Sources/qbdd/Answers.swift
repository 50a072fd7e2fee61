import Backend
import Configuration
import Control
import Glibc
import Volumes

// From what the rooms below know to what goes over the control socket.

extension ControlError {
    init(_ error: BackendError) {
        self.init(Self.documented(error.code), error.message)
    }

    init(_ error: ConfigurationError) {
        self.init(Self.documented(error.systemError ?? EINVAL), "\(error)")
    }

    /// Both errnos for missing permission have the one documented exit status. What says of the command's connection
    /// that the daemon is not there, or went, is not said of a store's.
    static func documented(_ code: Int32) -> Int32 {
        switch code {
        case EACCES: EPERM
        case ECONNREFUSED, ECONNRESET: EHOSTDOWN
        default: code
        }
    }
}

extension MappingRecord {
    init(_ mapped: MappedVolume) {
        self.init(
            deviceID: mapped.deviceID, id: mapped.record.id, device: mapped.device ?? "-", volume: mapped.name,
            config: mapped.configPath, limits: Limits(mapped.limits), state: mapped.state.rawValue, since: mapped.since,
            health: mapped.health.rawValue,
            healthSince: mapped.healthSince,
            size: mapped.record.size, blockSize: mapped.record.blockSize, transport: mapped.protocolName,
            readOnly: mapped.readOnly, uri: mapped.uri, connections: mapped.connections,
            flushesFailSince: mapped.flushesFailSince)
    }
}

extension GateState {
    init(_ mode: ResumeMode) {
        self =
            switch mode {
            case .normal: .normal
            case .error: .error
            case .discard: .discard
            }
    }
}

extension Limits {
    init(_ limits: ThrottleLimits) {
        self.init(
            readBytes: limits.readBytes, writeBytes: limits.writeBytes, readOperations: limits.readOperations,
            writeOperations: limits.writeOperations, burst: limits.burst)
    }
}

extension ThrottleArgument {
    /// What is not given stays as it is.
    func apply(to limits: inout ThrottleLimits) {
        limits.readBytes = readBytes ?? limits.readBytes
        limits.writeBytes = writeBytes ?? limits.writeBytes
        limits.readOperations = readOperations ?? limits.readOperations
        limits.writeOperations = writeOperations ?? limits.writeOperations
        limits.burst = burst ?? limits.burst
    }
}

extension MappingStatus {
    init(_ status: VolumeStatus) {
        let counters = status.counters
        self.init(
            mapping: MappingRecord(status.mapping),
            counters: .init(
                reads: counters.reads, writes: counters.writes, flushes: counters.flushes,
                trims: counters.trims + counters.writeZeroes, readBytes: counters.bytesRead,
                writtenBytes: counters.bytesWritten, errors: counters.errors, slow: counters.slow,
                inFlight: UInt64(max(status.inFlight, 0))),
            heldBack: .init(
                requests: UInt64(status.heldBack.count), oldest: status.heldBack.oldest,
                by: status.heldBack.reason?.rawValue),
            latency: .init(
                reads: .init(status.readLatency), writes: .init(status.writeLatency),
                flushes: .init(status.flushLatency)),
            conductor: status.cluster?.conductor,
            shards: status.cluster?.shards.enumerated().map {
                Shard(index: $0, stores: $1.addresses, store: $1.store)
            },
            stores: status.cluster?.stores.map {
                Store(
                    address: $0.address, state: $0.state.rawValue, connections: $0.connections, inFlight: $0.requests,
                    trouble: $0.trouble)
            },
            waits: status.waits, room: status.space.map { PoolRoom($0, of: status.mapping.pool) })
    }
}

extension MappingStatus.Percentiles {
    init(_ summary: LatencySummary) {
        self.init(
            count: summary.count, p50: summary.p50, p90: summary.p90, p99: summary.p99, p999: summary.p999,
            max: summary.maximum)
    }
}

extension PoolRoom {
    init(_ space: PoolSpace, of pool: String) {
        self.init(pool: pool, total: space.total, free: space.free, nearlyFull: space.isNearlyFull)
    }
}

extension PoolVolume {
    init(_ record: VolumeRecord, inPool pool: String) {
        self.init(
            volume: "\(pool)/\(record.volume)", id: record.id, size: record.size, blockSize: record.blockSize,
            created: record.created)
    }
}
