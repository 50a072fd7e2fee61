import Backend
import EventLoop
import Glibc
import Logging
import NBD
import Synchronization

/// How a volume is to be mapped.
package struct MapOptions: Sendable {
    package var readOnly: Bool
    /// Absolute path of the configuration the pool came from.
    package var configPath: String

    package init(readOnly: Bool, configPath: String) {
        self.readOnly = readOnly
        self.configPath = configPath
    }
}

/// Maps, unmaps and shows the volumes of this host. Call from any task; what concerns one volume is done one after the
/// other, different volumes side by side.
package final class VolumeManager: Sendable {
    /// Seconds clients have for their last replies when their volume goes away.
    private static let grace: UInt64 = 5

    private struct Mapping {
        let deviceID: UInt32
        let pool: any VolumePool
        let options: MapOptions
        let volume: Volume
    }

    private struct State {
        var mappings: [String: Mapping] = [:]
        /// Being mapped: not in `mappings` yet.
        var reserved: Set<UInt32> = []
        var listeners: [Listener] = []
        var stopping = false
        /// The Unix socket was made here.
        var ownsSocket = false
    }

    private let nbdSocketPath: String
    private let tcpListen: (host: String, port: UInt16)?
    private let maximumConnections: Int
    private let logger: Logger
    private let blocking: BlockingThread
    private let listenerLoop: EventLoop
    private let registry: ExportRegistry
    private let names = NameQueues()
    private let state = Mutex(State())

    /// - Parameters:
    ///   - nbdSocketPath: the Unix socket of all exports.
    ///   - tcpListen: an address for NBD over TCP, or nil for none.
    ///   - maximumConnections: NBD clients per volume, 1...64.
    package init(
        nbdSocketPath: String, tcpListen: (host: String, port: UInt16)?, maximumConnections: Int, logger: Logger
    ) throws(BackendError) {
        self.nbdSocketPath = nbdSocketPath
        self.tcpListen = tcpListen
        self.maximumConnections = maximumConnections
        self.logger = logger
        registry = ExportRegistry(logger: logger)
        do {
            blocking = try BlockingThread()
            listenerLoop = try EventLoop(name: "qbd:nbd")
        } catch { throw BackendError(error) }
    }

    /// Opens the sockets for NBD clients.
    package func start() async throws(BackendError) {
        let path = nbdSocketPath
        try await listen(isTCP: false) { () throws(SystemError) in try ListeningSocket.unix(path: path) }
        state.withLock { $0.ownsSocket = true }
        guard let tcpListen else { return }
        try await listen(isTCP: true) { () throws(SystemError) in
            try ListeningSocket.tcp(host: tcpListen.host, port: tcpListen.port)
        }
        logger.info("NBD clients are served at \(tcpListen.host):\(tcpListen.port), without encryption or passwords")
    }

    private func listen(
        isTCP: Bool, _ open: @escaping @Sendable () throws(SystemError) -> Int32
    ) async throws(BackendError) {
        do throws(SystemError) {
            let descriptor = try await blocking.run(open)
            let result = await listenerLoop.call { [listenerLoop, registry] () -> Result<Listener, SystemError> in
                do throws(SystemError) {
                    return .success(
                        try Listener(loop: listenerLoop, descriptor: descriptor, isTCP: isTCP, host: registry))
                } catch { return .failure(error) }
            }
            guard let result else { throw SystemError(code: ESHUTDOWN, operation: "listen for NBD clients") }
            let listener = try result.get()
            state.withLock { $0.listeners.append(listener) }
        } catch { throw BackendError(error) }
    }

    // MARK: Volumes of a pool

    package func create(
        _ pool: any VolumePool, volume: String, size: UInt64, blockSize: UInt32
    ) async throws(BackendError) -> VolumeRecord {
        guard blockSize == 512 || blockSize == 4096 else {
            throw BackendError(code: EINVAL, message: "block size \(blockSize): it can be 512 or 4096 bytes")
        }
        guard size > 0, size % UInt64(blockSize) == 0, size <= UInt64(Int64.max) else {
            throw BackendError(
                code: EINVAL, message: "size \(size): it must be a multiple of the block size, \(blockSize) bytes")
        }
        let record = try await blocking.run { () throws(BackendError) in
            try pool.create(volume: volume, size: size, blockSize: blockSize)
        }
        logger.info("created, \(size) bytes", metadata: ["volume": "\(pool.name)/\(volume)"])
        return record
    }

    package func delete(_ pool: any VolumePool, volume: String) async throws(BackendError) {
        let name = "\(pool.name)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            if let mapping = mapping(name), mapping.pool === pool {
                throw BackendError(code: EBUSY, message: "\(name) is mapped; unmap it first: qbd unmap \(name)")
            }
            try await blocking.run { () throws(BackendError) in try pool.delete(volume: volume) }
        }
        logger.info("deleted", metadata: ["volume": "\(name)"])
    }

    package func volumes(_ pool: any VolumePool) async throws(BackendError) -> [VolumeRecord] {
        try await blocking.run { () throws(BackendError) in try pool.list() }
    }

    // MARK: Mapping

    private func mapping(_ name: String) -> Mapping? { state.withLock { $0.mappings[name] } }

    /// Opens the volume and exports it. What is mapped already in the same way is a success.
    package func map(
        _ pool: any VolumePool, volume: String, options: MapOptions
    ) async throws(BackendError) -> MappedVolume {
        let name = "\(pool.name)/\(volume)"
        return try await names.run(name) { [self] () throws(BackendError) in
            if let mapping = mapping(name) {
                try checkAgreement(mapping, options, name)
                return await describe(mapping)
            }
            return try await open(pool, volume, options, name, sessionsChanged: { _ in })
        }
    }

    private func checkAgreement(_ mapping: Mapping, _ options: MapOptions, _ name: String) throws(BackendError) {
        if mapping.options.configPath != options.configPath {
            throw BackendError(
                code: EEXIST, message: "\(name) is mapped already, with \(mapping.options.configPath); unmap it first")
        }
        if mapping.options.readOnly != options.readOnly {
            let how = mapping.options.readOnly ? "read-only" : "writable"
            throw BackendError(code: EEXIST, message: "\(name) is mapped already, \(how); unmap it first")
        }
    }

    private func open(
        _ pool: any VolumePool, _ volume: String, _ options: MapOptions, _ name: String,
        sessionsChanged: @escaping @Sendable (Int) -> Void
    ) async throws(BackendError) -> MappedVolume {
        guard let deviceID = reserveDeviceID() else {
            throw BackendError(code: ESHUTDOWN, message: "\(name) is not mapped: qbdd is stopping")
        }
        defer { state.withLock { _ = $0.reserved.remove(deviceID) } }
        let opened = try await blocking.run { () throws(BackendError) in
            try pool.open(volume: volume, readOnly: options.readOnly)
        }
        var volumeLogger = logger
        volumeLogger[metadataKey: "volume"] = "\(name)"
        do {
            let volume = try await Volume.start(
                name: name, opened: opened, maximumSessions: maximumConnections, logger: volumeLogger,
                sessionsChanged: sessionsChanged)
            let mapping = Mapping(deviceID: deviceID, pool: pool, options: options, volume: volume)
            state.withLock { $0.mappings[name] = mapping }
            registry.add(volume)
            volumeLogger.info(
                "mapped\(options.readOnly ? " read-only" : ""), \(opened.record.size) bytes, \(opened.protocolName)")
            return await describe(mapping)
        } catch {
            await blocking.run { opened.close() }
            throw error
        }
    }

    /// The smallest free number; nil when the daemon is stopping.
    private func reserveDeviceID() -> UInt32? {
        state.withLock { state in
            guard !state.stopping else { return nil }
            let used = Set(state.mappings.values.map(\.deviceID)).union(state.reserved)
            let free = (UInt32(0)...).first { !used.contains($0) }
            if let free { state.reserved.insert(free) }
            return free
        }
    }

    /// Ends a mapping. EBUSY while NBD clients are connected, unless forced.
    package func unmap(pool: String, volume: String, force: Bool) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            let clients = await mapping.volume.status()?.clients ?? []
            if !force, !clients.isEmpty {
                throw BackendError(
                    code: EBUSY,
                    message: "\(name) is in use by \(clients.count) NBD client\(clients.count == 1 ? "" : "s") "
                        + "(\(clients.prefix(4).joined(separator: ", "))); disconnect them first")
            }
            await close(mapping, name)
        }
    }

    private func close(_ mapping: Mapping, _ name: String) async {
        registry.remove(name)
        await mapping.volume.stop(grace: Self.grace)
        await blocking.run { mapping.volume.opened.close() }
        state.withLock { $0.mappings[name] = nil }
        logger.info("unmapped", metadata: ["volume": "\(name)"])
    }

    private func notMapped(_ name: String) -> BackendError {
        BackendError(code: ENOTTY, message: "\(name) is not mapped; `qbd list` shows what is")
    }

    // MARK: Showing

    /// Ordered by device id.
    package func list() async -> [MappedVolume] {
        let mappings = state.withLock { $0.mappings.values.sorted { $0.deviceID < $1.deviceID } }
        var list: [MappedVolume] = []
        for mapping in mappings { list.append(await describe(mapping)) }
        return list
    }

    /// - Returns: nil when it is not mapped.
    package func configPath(pool: String, volume: String) -> String? {
        mapping("\(pool)/\(volume)")?.options.configPath
    }

    package func info(pool: String, volume: String) async throws(BackendError) -> VolumeStatus {
        let name = "\(pool)/\(volume)"
        guard let mapping = mapping(name), let status = await mapping.volume.status() else { throw notMapped(name) }
        return VolumeStatus(
            mapping: describe(mapping, status), counters: status.counters, inFlight: status.inFlight,
            readLatency: status.readLatency, writeLatency: status.writeLatency, flushLatency: status.flushLatency,
            clients: status.clients)
    }

    private func describe(_ mapping: Mapping) async -> MappedVolume {
        describe(mapping, await mapping.volume.status())
    }

    private func describe(_ mapping: Mapping, _ status: VolumeLoopStatus?) -> MappedVolume {
        MappedVolume(
            deviceID: mapping.deviceID, pool: mapping.pool.name, record: mapping.volume.opened.record, device: nil,
            configPath: mapping.options.configPath, readOnly: mapping.options.readOnly,
            protocolName: mapping.volume.opened.protocolName,
            uri: "nbd+unix:///\(mapping.volume.name)?socket=\(nbdSocketPath)", state: status?.state ?? .normal,
            since: status?.since ?? 0, connections: status?.connections ?? 0)
    }

    // MARK: One volume for one process

    /// Serves one volume on a listening socket that was handed to this process; returns when the last client has gone.
    package func serve(
        _ pool: any VolumePool, volume: String, options: MapOptions, listenDescriptor: Int32
    ) async throws(BackendError) {
        let name = "\(pool.name)/\(volume)"
        let (gone, continuation) = AsyncStream.makeStream(of: Void.self)
        _ = try await open(pool, volume, options, name) { count in
            if count == 0 { continuation.yield() }
        }
        registry.setDefault(name)
        let flags = fcntl(listenDescriptor, F_GETFL)
        guard flags >= 0, fcntl(listenDescriptor, F_SETFL, flags | O_NONBLOCK) == 0 else {
            throw BackendError(code: errno, message: "descriptor \(listenDescriptor) is no socket to serve on")
        }
        try await listen(isTCP: false) { () throws(SystemError) in listenDescriptor }
        for await _ in gone {
            // A client may have come between the last one's end and here.
            let connections = await mapping(name)?.volume.status()?.connections ?? 0
            if connections == 0 { break }
        }
        await shutdown()
    }

    // MARK: The end

    /// Takes no more clients, finishes what is in flight, and closes everything.
    package func shutdown() async {
        let (mappings, listeners, ownsSocket) = state.withLock { state in
            state.stopping = true
            defer { state.listeners = [] }
            return (state.mappings.keys.sorted(), state.listeners, state.ownsSocket)
        }
        _ = await listenerLoop.call { for listener in listeners { listener.close() } }
        await withTaskGroup(of: Void.self) { group in
            for name in mappings {
                group.addTask { [self] in
                    await names.run(name) { [self] in
                        if let mapping = mapping(name) { await close(mapping, name) }
                    }
                }
            }
        }
        // A socket that was handed to the process belongs to whoever made it.
        if ownsSocket { unlink(nbdSocketPath) }
        listenerLoop.stop()
    }
}
