import Backend
import EventLoop
import Glibc
import Logging
import NBD
import Synchronization

/// What a mapped volume becomes.
package enum MapTarget: Sendable, Equatable {
    /// An NBD export, without a kernel device.
    case export
    /// A block device; `wanted` is `/dev/nbdX`, or nil for any that is free.
    case device(wanted: String?)
}

/// How a volume is to be mapped.
package struct MapOptions: Sendable {
    package var target: MapTarget
    package var readOnly: Bool
    /// Absolute path of the configuration the pool came from.
    package var configPath: String
    /// From the first request on.
    package var limits: ThrottleLimits
    /// The number it gets if that is free; else, and when this is nil, the smallest that is.
    package var deviceID: UInt32?
    /// Of the configuration the pool came from, as it was then.
    package var timing: VolumeTiming

    package init(
        target: MapTarget, readOnly: Bool, configPath: String, limits: ThrottleLimits = .none, deviceID: UInt32? = nil,
        timing: VolumeTiming = VolumeTiming()
    ) {
        self.timing = timing
        self.deviceID = deviceID
        self.target = target
        self.limits = limits
        self.readOnly = readOnly
        self.configPath = configPath
    }
}

/// A socket's file, as it was when it was made here.
struct SocketFile: Sendable {
    private let path: String
    private let device: dev_t
    private let inode: ino_t

    init(path: String) throws(BackendError) {
        var status = stat()
        do throws(SystemError) { try retrying("look at \(path)") { lstat(path, &status) } } catch {
            throw BackendError(error)
        }
        self.path = path
        (device, inode) = (status.st_dev, status.st_ino)
    }

    /// What somebody else has put there, or what cannot be told, stays.
    func remove(_ logger: Logger) {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            if errno != ENOENT { logger.warning("\(path) is left: \(errnoText(errno))") }
            return
        }
        if status.st_dev == device, status.st_ino == inode { unlink(path) }
    }
}

/// How long things may take.
package struct VolumeTiming: Sendable {
    /// Milliseconds from which on a request counts as slow.
    package var slowIO: UInt64
    /// Seconds a volume has to become ready when it is mapped.
    package var open: UInt64

    package init(slowIO: UInt64 = 2000, open: UInt64 = 180) {
        self.slowIO = slowIO
        self.open = open
    }
}

/// Maps, unmaps and shows the volumes of this host. Call from any task; what concerns one volume is done one after the
/// other, different volumes side by side.
package final class VolumeManager: Sendable {
    /// Seconds clients have for their last replies when their volume goes away.
    static let grace: UInt64 = 5

    struct Mapping {
        let deviceID: UInt32
        let pool: any VolumePool
        let options: MapOptions
        let volume: Volume
        let device: AttachedDevice?
        var settings: VolumeSettings
        /// The state folder has older settings: it could not be written.
        var isUnsaved = false
    }

    struct State {
        var mappings: [String: Mapping] = [:]
        /// What an earlier daemon had mapped, and this one has not taken over.
        var leftovers: [String: Leftover] = [:]
        /// Maps under way, in the order asked.
        var pending: [String: [PendingMap]] = [:]
        /// Being mapped: not in `mappings` yet.
        var reserved: Set<UInt32> = []
        var listeners: [Listener] = []
        /// Made with the first device.
        var watcher: KernelEventWatcher?
        var stopping = false
        /// What is known of the room in the pools of mappings.
        var rooms: [ObjectIdentifier: PoolWatch] = [:]
        /// Looks after them from the first mapping on.
        var roomsAreWatched = false
        /// Pools being tidied; true when that is to be done once more.
        var tidying: [ObjectIdentifier: Bool] = [:]
        var shutdown: Task<Void, Never>?
        /// The Unix socket that was made here.
        var socket: SocketFile?
    }

    let nbdSocketPath: String
    let maximumConnections: Int
    let deviceSettings: DeviceSettings
    let logger: Logger
    let blocking: BlockingThread
    /// For what copies data, and may take minutes.
    let copying: BlockingThread
    let store: MappingStore?
    let listenerLoop: EventLoop
    private let registry: ExportRegistry
    let names = NameQueues()
    let state = Mutex(State())

    /// - Parameters:
    ///   - nbdSocketPath: the Unix socket of all exports.
    ///   - maximumConnections: NBD clients per volume, 1...1024.
    ///   - statePath: the folder for what must survive the daemon; nil keeps nothing.
    package init(
        nbdSocketPath: String, maximumConnections: Int, deviceSettings: DeviceSettings, statePath: String?,
        logger: Logger
    ) throws(BackendError) {
        self.nbdSocketPath = nbdSocketPath
        self.maximumConnections = maximumConnections
        self.deviceSettings = deviceSettings
        if let statePath { store = try MappingStore(path: statePath) } else { store = nil }
        self.logger = logger
        registry = ExportRegistry(logger: logger)
        do {
            blocking = try BlockingThread()
            copying = try BlockingThread(name: "qbd:copying")
            listenerLoop = try EventLoop(name: "qbd:nbd")
        } catch { throw BackendError(error) }
    }

    /// Opens the socket for NBD clients of this host.
    package func start() async throws(BackendError) {
        let path = nbdSocketPath
        try await listen(isTCP: false) { () throws(SystemError) in try ListeningSocket.unix(path: path) }
        let file = try SocketFile(path: path)
        state.withLock { $0.socket = file }
    }

    /// Opens a socket for NBD clients over TCP.
    /// - Returns: its port, the one that was chosen for 0.
    package func listen(host: String, port: UInt16) async throws(BackendError) -> UInt16 {
        let descriptor = try await listen(isTCP: true) { () throws(SystemError) in
            try ListeningSocket.tcp(host: host, port: port)
        }
        do throws(SystemError) { return try ListeningSocket.port(of: descriptor) } catch { throw BackendError(error) }
    }

    @discardableResult
    private func listen(
        isTCP: Bool, _ open: @escaping @Sendable () throws(SystemError) -> Int32
    ) async throws(BackendError) -> Int32 {
        // Looking a name up may take its time.
        let descriptor = try await Aside.run { () throws(BackendError) in
            do throws(SystemError) { return try open() } catch { throw BackendError(error) }
        }
        do throws(SystemError) {
            let result = await listenerLoop.call { [listenerLoop, registry] () -> Result<Listener, SystemError> in
                do throws(SystemError) {
                    return .success(
                        try Listener(loop: listenerLoop, descriptor: descriptor, isTCP: isTCP, host: registry))
                } catch {
                    Glibc.close(descriptor)
                    return .failure(error)
                }
            }
            guard let result else { throw SystemError(code: ESHUTDOWN, operation: "listen for NBD clients") }
            let listener = try result.get()
            state.withLock { $0.listeners.append(listener) }
            return descriptor
        } catch { throw BackendError(error) }
    }

    // MARK: Volumes of a pool

    package func create(
        _ pool: any VolumePool, volume: String, size: UInt64, blockSize: UInt32, replicas: Int? = nil
    ) async throws(BackendError) -> VolumeRecord {
        guard blockSize == 512 || blockSize == 4096 else {
            throw BackendError(code: EINVAL, message: "block size \(blockSize): it can be 512 or 4096 bytes")
        }
        guard size > 0, size % UInt64(blockSize) == 0, size <= UInt64(Int64.max) else {
            throw BackendError(
                code: EINVAL, message: "size \(size): it must be a multiple of the block size, \(blockSize) bytes")
        }
        guard (1...3).contains(replicas ?? 1) else {
            throw BackendError(code: EINVAL, message: "replicas \(replicas ?? 1): a volume has 1 to 3")
        }
        let name = "\(pool.name)/\(volume)"
        let record = try await names.run(name) { [self] () throws(BackendError) in
            // It must not come to a device that was another volume's.
            try refuseLeftover(name)
            return try await Aside.run { () throws(BackendError) in
                try pool.create(volume: volume, size: size, blockSize: blockSize, replicas: replicas)
            }
        }
        logger.info("created, \(size) bytes", metadata: ["volume": "\(name)"])
        return record
    }

    /// - Parameter force: also what is damaged and may still have good data.
    package func delete(
        _ pool: any VolumePool, volume: String, snapshots: Bool = false, force: Bool = false
    ) async throws(BackendError) {
        let name = "\(pool.name)/\(volume)"
        try await changeUnmapped(pool, name) { () throws(BackendError) in
            try pool.delete(volume: volume, snapshots: snapshots, force: force)
        }
        logger.info("deleted", metadata: ["volume": "\(name)"])
        tidy(pool)
    }

    /// Changes a volume that is not mapped, and that no device left behind stands for.
    func changeUnmapped(
        _ pool: any VolumePool, _ name: String, _ change: @escaping @Sendable () throws(BackendError) -> Void
    ) async throws(BackendError) {
        try await names.run(name) { [self] () throws(BackendError) in
            if let mapping = mapping(name), mapping.pool === pool {
                throw BackendError(code: EBUSY, message: "\(name) is mapped; unmap it first: qbd unmap \(name)")
            }
            try refuseLeftover(name)
            try await Aside.run(change)
        }
    }

    package func contents(_ pool: any VolumePool) async throws(BackendError) -> PoolContents {
        try await Aside.run { () throws(BackendError) in
            PoolContents(volumes: try pool.list(), damaged: try pool.damaged(), space: try pool.space())
        }
    }

    // MARK: Mapping

    /// Volumes are mapped, or devices of an earlier daemon wait for theirs.
    package var hasMappings: Bool { state.withLock { !$0.mappings.isEmpty || !$0.leftovers.isEmpty } }

    func mapping(_ name: String) -> Mapping? { state.withLock { $0.mappings[name] } }

    /// Opens the volume and exports it. What is mapped already in the same way is a success.
    package func map(
        _ pool: any VolumePool, volume: String, options: MapOptions
    ) async throws(BackendError) -> MappedVolume {
        let name = "\(pool.name)/\(volume)"
        let pending = PendingMap(configPath: options.configPath)
        add(pending, name)
        defer { remove(pending, name) }
        return try await names.run(name) { [self] () throws(BackendError) in
            try Self.check(options.limits)
            if let mapping = mapping(name) {
                try Self.checkAgreement(
                    name, config: mapping.options.configPath, readOnly: mapping.options.readOnly, mapping.device,
                    with: options)
                return await describe(mapping)
            }
            if case .device = options.target { try await requireDriver(for: name) }
            if let mapped = try await mapLeftover(pool, options, pending, name) { return mapped }
            return try await open(pool, volume, options, name, pending) { [weak self] event in
                self?.handle(event, pool.name, volume)
            }
        }
    }

    /// A connection with the kernel that ends by itself leaves its device waiting for another, and that flushes fail is
    /// written down.
    func handle(_ event: SessionEvent, _ pool: String, _ volume: String) {
        switch event {
        case .sessions: break
        case .flushesFail(let since, let written):
            Task {
                await write(flushesFailSince: since, pool, volume)
                written()
            }
        case .kernelConnectionLost:
            Task { await connectAgain(pool, volume) }
        }
    }

    private func open(
        _ pool: any VolumePool, _ volume: String, _ options: MapOptions, _ name: String, _ pending: PendingMap?,
        report: @escaping @Sendable (SessionEvent) -> Void
    ) async throws(BackendError) -> MappedVolume {
        let others = try await numbersOfOthers(options.target)
        guard let deviceID = reserveDeviceID(options.deviceID, except: others, for: name) else {
            throw BackendError(code: ESHUTDOWN, message: "\(name) is not mapped: qbdd is stopping")
        }
        defer { unreserve(deviceID) }
        let settings = VolumeSettings(limits: options.limits)
        let bringUp = BringUp(.map(limit: options.timing.open), now: monotonicNanoseconds())
        let volume = try await serve(pool, volume, options, settings, bringUp, name, pending, report: report)
        var identifier: DeviceIdentifier?
        if case .device = options.target { identifier = store?.newIdentifier(deviceID, name) }
        do throws(BackendError) {
            try await remember(pool, options, settings, volume, deviceID, identifier)
            var device: AttachedDevice?
            if case .device(let wanted) = options.target, let identifier {
                device = try await attachDevice(volume, identifier, wanted: wanted)
            }
            return await add(
                Mapping(
                    deviceID: deviceID, pool: pool, options: options, volume: volume, device: device,
                    settings: settings))
        } catch {
            await end(volume, failingHeld: true)
            await forget(volume)
            throw error
        }
    }

    func add(_ mapping: Mapping) async -> MappedVolume {
        state.withLock { state in
            state.mappings[mapping.volume.name] = mapping
            state.leftovers[mapping.volume.name] = nil
        }
        if mapping.device != nil { await watchDevices() }
        watchRoom(of: mapping.pool)
        // What is a device has one user, the kernel, with a cache of its own.
        if mapping.device == nil { registry.add(mapping.volume) }
        let opened = mapping.volume.opened
        mapping.volume.logger.info(
            """
            mapped as \(mapping.device.map { "/dev/\($0.name) (\($0.device.path))" } ?? "an export")\
            \(mapping.options.readOnly ? ", read-only" : ""), \(opened.record.size) bytes, \(opened.protocolName)
            """)
        return await describe(mapping)
    }

    /// A number for a volume; nil when the daemon is stopping.
    /// - Parameters:
    ///   - wanted: taken if it is free; else the smallest is that is.
    ///   - others: numbers that are not free either.
    private func reserveDeviceID(_ wanted: UInt32?, except others: Set<UInt32>, for name: String) -> UInt32? {
        state.withLock { state in
            guard !state.stopping else { return nil }
            let used = Set(state.mappings.values.map(\.deviceID)).union(state.reserved).union(others)
                .union(state.leftovers.filter { $0.key != name }.values.map(\.deviceID))
            let free = wanted.flatMap { used.contains($0) ? nil : $0 } ?? (UInt32(0)...).first { !used.contains($0) }
            if let free { state.reserved.insert(free) }
            return free
        }
    }

    /// Ends a mapping. EBUSY while it is in use, unless forced.
    /// - Returns: who lost the device by force; nil for nobody.
    package func unmap(pool: String, volume: String, force: Bool) async throws(BackendError) -> String? {
        let name = "\(pool)/\(volume)"
        if force { cancelSuspend(name) }
        let wasPending = giveUpMaps(of: name)
        return try await names.run(name) { [self] () throws(BackendError) -> String? in
            guard let mapping = mapping(name) else {
                // What it was asked to end is not there any more, and never was.
                if wasPending, leftover(name) == nil { return nil }
                return try await unmapLeftover(name, force: force)
            }
            let clients = await mapping.volume.status()?.clients ?? []
            if !force, !clients.isEmpty {
                throw BackendError(
                    code: EBUSY,
                    message: "\(name) is in use by \(clients.count) NBD client\(clients.count == 1 ? "" : "s") "
                        + "(\(clients.prefix(4).joined(separator: ", "))); disconnect them first")
            }
            var warning: String?
            if let device = mapping.device {
                warning = try await detachDevice(device, mapping.volume, mapping.volume.logger, force: force)
            }
            registry.remove(name)
            let ending = Task { await end(mapping.volume, failingHeld: true) }
            if force, await !ending.isDone(within: Self.grace + 1) {
                // They are answered for nobody, and hold up no more than the next map.
                let left = "requests are still with the store; the volume can be mapped again when they are done"
                warning = warning.map { "\($0); \(left)" } ?? left
            } else {
                await ending.value
            }
            state.withLock { $0.mappings[name] = nil }
            let left = await forget(mapping.volume)
            mapping.volume.logger.info("unmapped")
            return Self.joined(warning, left)
        }
    }

    static func joined(_ first: String?, _ second: String?) -> String? {
        let texts = [first, second].compactMap(\.self)
        return texts.isEmpty ? nil : texts.joined(separator: "; ")
    }

    private func close(_ mapping: Mapping, _ name: String) async {
        registry.remove(name)
        await keepUnsaved(mapping)
        await end(mapping.volume, failingHeld: false)
        state.withLock { $0.mappings[name] = nil }
    }

    // MARK: One volume for one process

    /// Serves one volume on a listening socket that was handed to this process; returns when the last client has gone.
    package func serve(
        _ pool: any VolumePool, volume: String, options: MapOptions, listenDescriptor: Int32
    ) async throws(BackendError) {
        let name = "\(pool.name)/\(volume)"
        let (gone, continuation) = AsyncStream.makeStream(of: Void.self)
        _ = try await open(pool, volume, options, name, nil) { event in
            switch event {
            case .sessions(0): continuation.yield()
            case .flushesFail(_, let written): written()
            default: break
            }
        }
        registry.setDefault(name)
        registry.observe { continuation.yield() }
        let flags = fcntl(listenDescriptor, F_GETFL)
        guard flags >= 0, fcntl(listenDescriptor, F_SETFL, flags | O_NONBLOCK) == 0 else {
            throw BackendError(code: errno, message: "descriptor \(listenDescriptor) is no socket to serve on")
        }
        try await listen(isTCP: false) { () throws(SystemError) in listenDescriptor }
        for await _ in gone {
            // A client may have come between the last one's end and here.
            guard registry.handshakes == 0 else { continue }
            let connections = await mapping(name)?.volume.status()?.connections ?? 0
            if connections == 0 { break }
        }
        await shutdown()
    }

    // MARK: The end

    /// Takes no more clients, finishes what is in flight, and closes everything, in a few seconds: what takes longer is
    /// left as it is. Devices stay, and their I/O waits for the next daemon; exports come back with it.
    ///
    /// Also when it was called before: returns when that is done.
    package func shutdown() async {
        let task = state.withLock { state in
            let task = state.shutdown ?? Task { [self] in await close() }
            state.shutdown = task
            return task
        }
        await task.value
    }

    private func close() async {
        let (names, listeners, watcher, socket) = state.withLock { state in
            state.stopping = true
            defer { (state.listeners, state.watcher) = ([], nil) }
            let names = Set(state.mappings.keys).union(state.leftovers.keys).sorted()
            return (names, state.listeners, state.watcher, state.socket)
        }
        _ = await listenerLoop.call {
            for listener in listeners { listener.close() }
            watcher?.close()
        }
        await withTaskGroup(of: Void.self) { group in
            for name in names {
                // Or else the end would wait until that suspend's time has passed.
                cancelSuspend(name)
                group.addTask { [self] in
                    let ending = Task {
                        await self.names.run(name) { [self] in
                            if let mapping = mapping(name) { await close(mapping, name) }
                        }
                    }
                    // All other devices wait for the next daemon, and it for the end of this one.
                    guard await !ending.isDone(within: Self.grace + 1) else { return }
                    logger.warning(
                        "given up: its store has not answered for \(Self.grace + 1) s, or a command for it goes on",
                        metadata: ["volume": "\(name)"])
                }
            }
        }
        // A socket that was handed to the process belongs to whoever made it.
        socket?.remove(logger)
        listenerLoop.stop()
    }
}
