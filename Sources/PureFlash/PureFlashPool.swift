import Backend
import EventLoop
import Glibc
import Logging
import class NIOCore.EventLoopFuture
import Synchronization

/// A tenant of a PureFlash cluster. Its volumes are listed, made and grown by the conductor; their data is with the
/// stores.
package final class PureFlashPool: VolumePool {
    package let name: String
    let conductor: ConductorClient
    private let settings: PureFlashSettings
    private let watch: StoreWatch
    private let logger: Logger

    /// - Parameter name: the tenant's.
    package init(name: String, conductor: ConductorClient, settings: PureFlashSettings, logger: Logger) {
        self.name = name
        self.conductor = conductor
        self.settings = settings
        self.logger = logger
        watch = StoreWatch(port: settings.httpPort, grace: settings.grace)
    }

    package func create(volume: String, size: UInt64, blockSize: UInt32) throws(BackendError) -> VolumeRecord {
        try create(volume: volume, size: size, blockSize: blockSize, replicas: nil)
    }

    package func create(
        volume: String, size: UInt64, blockSize: UInt32, replicas: Int?
    ) throws(BackendError) -> VolumeRecord {
        guard blockSize == StoreProtocol.sector else {
            throw BackendError(
                code: EINVAL, message: "block size \(blockSize): a PureFlash volume has blocks of 512 bytes")
        }
        let made = try conductor.create(tenant: name, volume: volume, size: size, replicas: replicas ?? 1)
        return record(made.id, volume, made.size)
    }

    /// Its snapshots go with it, or hinder it, as the conductor does.
    package func delete(volume: String, snapshots: Bool, force: Bool) throws(BackendError) {
        try conductor.delete(tenant: name, volume: volume)
    }

    package func list() throws(BackendError) -> [VolumeRecord] {
        try conductor.list(tenant: name).map { record($0.id, $0.name, $0.size) }.sorted { $0.volume < $1.volume }
    }

    package func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let current = try find(volume)
        guard let size else { return current }
        let grown = try grow(current, to: size)
        if Self.needsShard(current, for: size) { try check(open(volumeNamed: volume), has: size, volume) }
        return grown
    }

    /// Whether the size goes beyond the border of a shard.
    private static func needsShard(_ current: VolumeRecord, for size: UInt64) -> Bool {
        (size - 1) / StoreProtocol.shardSize > (current.size - 1) / StoreProtocol.shardSize
    }

    func find(_ volume: String) throws(BackendError) -> VolumeRecord {
        guard let found = try list().first(where: { $0.volume == volume }) else {
            throw BackendError(
                code: ENOENT, message: "no volume \(volume) in pool \(name); `qbd volumes \(name)` lists what there is")
        }
        return found
    }

    fileprivate func grow(_ current: VolumeRecord, to size: UInt64) throws(BackendError) -> VolumeRecord {
        try current.checkGrowth(to: size, pool: name)
        guard size % (1 << 20) == 0 else {
            throw BackendError(
                code: EINVAL, message: "size \(size): a PureFlash volume grows to whole MiB (1048576 bytes)")
        }
        if Self.needsShard(current, for: size) {
            let limit = try open(volumeNamed: current.volume).sizeLimit
            guard size <= limit else {
                throw BackendError(
                    code: EOPNOTSUPP,
                    message:
                        "\(name)/\(current.volume) cannot have \(size) bytes: its shards hold \(limit), and the conductor"
                        + " adds none; make a larger volume, and copy it")
            }
        }
        try conductor.resize(tenant: name, volume: current.volume, size: size)
        return current.resized(to: size)
    }

    /// A conductor may have made a volume larger, and no shards for that.
    fileprivate func check(_ layout: VolumeLayout, has size: UInt64, _ volume: String) throws(BackendError) {
        guard layout.size < size else { return }
        throw BackendError(
            code: EREMOTEIO,
            message: layout.recordedSize < size
                ? "the conductor was asked to grow \(name)/\(volume) to \(size) bytes, and opens it with"
                    + " \(layout.recordedSize) bytes"
                : "the conductor has \(size) bytes for \(name)/\(volume) now, and \(layout.shards.count) shards of 64 GiB,"
                    + " which hold \(layout.size) bytes; it does not add shards: make a larger volume, and copy it")
    }

    /// The conductor does not say when a volume was made.
    private func record(_ id: UInt64, _ volume: String, _ size: UInt64) -> VolumeRecord {
        VolumeRecord(id: id, volume: volume, size: size, blockSize: StoreProtocol.sector, created: nil)
    }

    /// Fails with a code that says that time will help while the conductor is not there yet, or a shard has no store.
    package func open(volume: String, readOnly: Bool) throws(BackendError) -> any OpenVolume {
        try open(volume: volume, readOnly: readOnly, within: nil)
    }

    package func open(volume: String, readOnly: Bool, within limit: UInt64?) throws(BackendError) -> any OpenVolume {
        let layout = try open(volumeNamed: volume, within: limit)
        guard layout.shards.allSatisfy({ !$0.addresses.isEmpty }) else {
            throw BackendError(
                code: EHOSTDOWN,
                message: "no store serves all of \(name)/\(volume): a shard has no usable replica; look at the stores")
        }
        if layout.size < layout.recordedSize {
            logger.warning(
                "\(layout.recordedSize) bytes at the conductor, which has shards for \(layout.size): the rest is not served",
                metadata: ["volume": "\(name)/\(volume)"])
        }
        return PureFlashOpenVolume(
            pool: self, settings: settings, layout: layout, record: record(layout.id, volume, layout.size),
            readOnly: readOnly || layout.snapshot != StoreProtocol.head, logger: logger)
    }

    /// Fails with EHOSTDOWN, and asks the conductor nothing, when a store does not answer that the conductor may still
    /// believe alive.
    /// - Parameters:
    ///   - volume: `volume`, or `volume@snapshot`.
    ///   - limit: nanoseconds for all tries together.
    ///   - stores: the addresses of those that nothing is to happen to; nil for all that the conductor believes alive.
    ///   - lost: monotonic nanoseconds since which one is known not to answer, as far as that is known.
    ///   - completion: called on a thread of the conductor's client.
    fileprivate func open(
        volumeNamed volume: String, within limit: UInt64? = nil, sparing stores: Set<String>? = nil,
        since lost: [String: UInt64] = [:],
        completion: @escaping @Sendable (Result<VolumeLayout, BackendError>) -> Void
    ) {
        let parts = volume.split(separator: "@", maxSplits: 1)
        let snapshot = parts.count > 1 ? String(parts[1]) : ""
        doubtful(stores, since: lost, within: limit).whenComplete { [self] result in
            switch ConductorClient.outcome(result) {
            case .failure(let error): return completion(.failure(error))
            case .success(let doubtful) where !doubtful.isEmpty:
                return completion(.failure(unasked("opened", doubtful)))
            case .success: break
            }
            conductor.open(
                tenant: name, volume: String(parts.first ?? ""), snapshot: snapshot, within: limit
            ) { result in
                completion(
                    result.mapError { error in
                        // A conductor that does not find one has no words for it.
                        guard !snapshot.isEmpty, error.code == EREMOTEIO else { return error }
                        return BackendError(
                            code: ENOENT, message: "there is no snapshot '\(snapshot)' there: \(error.message)")
                    }.flatMap { layout in
                        // What is not asked for must be neither read nor written.
                        guard snapshot.isEmpty == (layout.snapshot == StoreProtocol.head) else {
                            return .failure(
                                BackendError(
                                    code: EPROTO,
                                    message:
                                        "the conductor's answer to open_volume has snap_seq \(layout.snapshot) for"
                                        + " \(volume)"))
                        }
                        return .success(layout)
                    })
            }
        }
    }

    private func doubtful(
        _ stores: Set<String>?, since lost: [String: UInt64], within limit: UInt64?
    ) -> EventLoopFuture<[String]> {
        let loop = ConductorClient.loop
        guard watch.canLook else { return loop.makeSucceededFuture([]) }
        if let stores { return watch.doubtful(stores, since: lost, on: loop) }
        return conductor.aliveStores(within: limit).flatMap { [watch] in watch.doubtful($0, on: loop) }
    }

    /// Fails with EHOSTDOWN when one that has a replica does not answer.
    func requireStores(of volume: String) throws(BackendError) {
        guard watch.canLook else { return }
        let stores = Set(try open(volumeNamed: volume).shards.flatMap(\.addresses))
        let silent = try conductor.wait(watch.silent(stores, on: ConductorClient.loop))
        guard silent.isEmpty else { throw unasked("changed", silent) }
    }

    private func unasked(_ done: String, _ doubtful: [String]) -> BackendError {
        BackendError(
            code: EHOSTDOWN,
            message:
                "\(StoreWatch.doubt(doubtful)) where its conductor would tell it things: a volume that is \(done) now"
                + " could lose its replica there for good")
    }

    fileprivate func open(volumeNamed volume: String, within limit: UInt64? = nil) throws(BackendError) -> VolumeLayout
    {
        let answer = Answer<Result<VolumeLayout, BackendError>>()
        let done = Semaphore()
        open(volumeNamed: volume, within: limit) { result in
            answer.set(result)
            done.signal()
        }
        done.wait()
        return try answer.take { preconditionFailure("the conductor's client gave no answer") }.get()
    }
}

/// A volume that the conductor has opened.
final class PureFlashOpenVolume: OpenVolume {
    private let pool: PureFlashPool
    let settings: PureFlashSettings
    private let known: Mutex<(record: VolumeRecord, layout: VolumeLayout)>
    let readOnly: Bool
    let logger: Logger

    var record: VolumeRecord { known.withLock { $0.record } }
    /// As of the last time the volume was opened or grown.
    var layout: VolumeLayout { known.withLock { $0.layout } }
    /// Who is asked for it; for people.
    var conductor: String { pool.conductor.name }
    /// `pool/volume`; for people.
    var name: String { "\(pool.name)/\(record.volume)" }
    /// A store has no trim.
    var canTrim: Bool { false }
    var protocolName: String { "tcp" }

    init(
        pool: PureFlashPool, settings: PureFlashSettings, layout: VolumeLayout,
        record: VolumeRecord, readOnly: Bool, logger: Logger
    ) {
        self.pool = pool
        self.settings = settings
        known = Mutex((record, layout))
        self.readOnly = readOnly
        var logger = logger
        logger[metadataKey: "volume"] = "\(pool.name)/\(record.volume)"
        self.logger = logger
    }

    func start(
        on loop: EventLoop, buffers: BufferPool, client: any BackendClient
    ) throws(BackendError) -> any Backend {
        try PureFlashVolume(self, loop: loop, buffers: buffers, client: client)
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let current = record
        if let size {
            guard !readOnly else {
                throw BackendError(
                    code: EROFS,
                    message: "\(pool.name)/\(current.volume) is mapped read-only; map it writable to grow it")
            }
            // Another host may have grown it since: asked for less, a conductor makes it smaller.
            let known = try pool.find(current.volume)
            guard known.id == current.id else { throw replaced(known.size) }
            _ = try pool.grow(known, to: size)
        }
        // The conductor has prepared the new shards, and says where they are.
        let layout = try pool.open(volumeNamed: current.volume)
        guard layout.id == current.id, layout.size >= current.size else { throw replaced(layout.size) }
        if let size { try pool.check(layout, has: size, current.volume) }
        let grown = current.resized(to: layout.size)
        known.withLock { $0 = (grown, layout) }
        return grown
    }

    private func replaced(_ size: UInt64) -> BackendError {
        BackendError(
            code: ESTALE,
            message: "\(pool.name)/\(record.volume) is another volume now, or a smaller one (\(size) bytes); unmap it")
    }

    /// Calls back on a thread of the conductor's client.
    /// - Parameters:
    ///   - stores: the addresses of those that nothing is to happen to.
    ///   - lost: monotonic nanoseconds since which stores are lost, by address.
    func reopen(
        sparing stores: Set<String>, since lost: [String: UInt64],
        _ completion: @escaping @Sendable (Result<VolumeLayout, BackendError>) -> Void
    ) {
        pool.open(volumeNamed: record.volume, sparing: stores, since: lost, completion: completion)
    }

    func close() {}
}
