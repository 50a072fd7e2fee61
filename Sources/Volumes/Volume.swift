import Backend
import CLinux
import EventLoop
import Glibc
import Logging
import NBD
import Synchronization

/// A mapped volume: its loop, its sessions, and the way of each request through gate, throttle and splitter to the
/// backend. Everything but `start`, `attach`, `stop` and `status` runs on the loop.
package final class Volume: SessionTarget, BackendClient, TurnObserver, @unchecked Sendable {
    package let name: String
    /// Its size changes. Clients learn of that at their next handshake.
    package var export: Export { currentExport.withLock { $0 } }
    private let currentExport: Mutex<Export>
    /// Another one after a change of the store.
    var opened: any OpenVolume { currentlyOpened.withLock { $0 } }
    let currentlyOpened: Mutex<any OpenVolume>
    /// Ends what a change of the store waits for before it holds I/O back; nil when there is none.
    let exchanging = Mutex<Patience?>(nil)
    let loop: EventLoop
    /// As many as a session can hold of a backend that takes 64 KiB at a time: what one client does not take is no other
    /// one's loss. Memory of those that are never used is never touched.
    private static let partsOfSession = 640
    /// Made by this process so far.
    private static let mappings = Atomic<UInt64>(0)
    let logger: Logger
    private let maximumSessions: Int
    /// Called on the loop.
    let report: @Sendable (SessionEvent) -> Void

    // The loop's state.
    let buffers: BufferPool
    package let pipes = PipePool()
    /// Where requests go: the store, or what stands in for it while they are discarded.
    var backend: (any Backend)?
    var store: (any Backend)?
    private let vectors: UnsafeMutablePointer<iovec>
    private(set) var sessions: ContiguousArray<Session> = []
    private var endedSessions: ContiguousArray<Session> = []
    var requests: Slab<Request>
    var parts: Slab<IO>
    /// Requests that wait for parts, oldest first; only the first has been begun.
    var firstWaiting: UnsafeMutablePointer<Request>?
    var lastWaiting: UnsafeMutablePointer<Request>?
    var gate: Gate
    var throttle = Throttle()
    /// Whether requests have to pass more than a flag.
    var needsAdmission = false
    /// Requests handed to the splitter and not yet completed.
    var atStore = 0
    var watch: Watch
    var counters = VolumeCounters()
    private let readLatency = LatencyHistogram()
    private let writeLatency = LatencyHistogram()
    private let flushLatency = LatencyHistogram()
    private(set) var stopping = false
    private var stopped: [@Sendable () -> Void] = []
    var kernel = KernelSide()
    var leaving = LeavingSessions()
    private var quiet: LoopTimer?
    private var activity: UInt64 = 0
    private var activityAtTimer: UInt64 = 0

    private init(
        name: String, opened: any OpenVolume, settings: VolumeSettings, slowIO: UInt64, loop: EventLoop,
        maximumSessions: Int, logger: Logger, report: @escaping @Sendable (SessionEvent) -> Void
    ) {
        self.name = name
        currentlyOpened = Mutex(opened)
        self.loop = loop
        self.maximumSessions = maximumSessions
        self.logger = logger
        self.report = report
        watch = Watch(slowIO: slowIO, isReadOnly: opened.readOnly, now: loop.now)
        gate = Gate(state: settings.gate, since: settings.gateSince)
        let record = opened.record
        var export = Export(
            name: name, description: "qbd \(opened.protocolName) volume", size: record.size,
            readOnly: opened.readOnly, minimumBlock: record.blockSize)
        export.preferredBlock = max(4096, record.blockSize)
        export.canTrim = opened.canTrim
        export.mapping = Self.mappings.wrappingAdd(1, ordering: .relaxed).newValue
        currentExport = Mutex(export)
        let sessions = maximumSessions + KernelSide.maximumSessions
        // The largest payload takes a region, and a session may have one in flight while it receives the next.
        buffers = BufferPool(maximumRegions: 2 * sessions + 4)
        vectors = .allocate(capacity: Session.vectorCapacity)
        requests = Slab(capacity: sessions * Session.maximumInFlight)
        parts = Slab(capacity: sessions * Self.partsOfSession)
    }

    deinit { vectors.deallocate() }

    // MARK: From the manager

    /// Starts a loop for an open volume. On an error the open volume is still the caller's.
    /// - Parameters:
    ///   - settings: hold from the first request on.
    ///   - slowIO: milliseconds from which on a request counts as slow.
    ///   - maximumSessions: NBD connections at a time, 1...64.
    ///   - report: called on the volume's loop.
    package static func start(
        name: String, opened: any OpenVolume, settings: VolumeSettings, slowIO: UInt64 = 2000, maximumSessions: Int,
        logger: Logger,
        report: @escaping @Sendable (SessionEvent) -> Void
    ) async throws(BackendError) -> Volume {
        let loop: EventLoop
        do { loop = try EventLoop(name: "qbd:\(name)") } catch { throw BackendError(error) }
        let volume = Volume(
            name: name, opened: opened, settings: settings, slowIO: slowIO, loop: loop,
            maximumSessions: maximumSessions, logger: logger, report: report)
        let failure = await loop.call { volume.begin(settings.limits) }
        if let failure = failure ?? nil {
            loop.stop()
            throw failure
        }
        return volume
    }

    private func begin(_ limits: ThrottleLimits) -> BackendError? {
        do {
            // The backend's end of turn comes first: what it completes there is answered in the same turn.
            store = try opened.start(on: loop, buffers: buffers, client: self)
        } catch { return error }
        throttle.set(limits, now: loop.now)
        enterGate(gate.state)
        quiet = LoopTimer(loop: loop) { [unowned self] in quietPassed() }
        watch.timer = LoopTimer(loop: loop) { [unowned self] in watchPassed() }
        loop.observe(self)
        return nil
    }

    /// Serves a connection whose handshake is done. From any thread.
    package func attach(descriptor: Int32, peer: String, negotiated: Negotiated, leftover: [UInt8]) {
        let accepted = loop.post { [self] in
            begin(descriptor: descriptor, peer: peer, negotiated: negotiated, leftover: leftover)
        }
        if !accepted { Glibc.close(descriptor) }
    }

    /// Finishes what is in flight, closes the sessions and the backend, and ends the loop. Clients that do not take
    /// their last replies within `grace` seconds are cut off.
    /// - Parameter failingHeld: answer requests that are held back with ESHUTDOWN; otherwise they are dropped without
    ///   an answer, so that a client that comes back sends them again.
    package func stop(grace: UInt64, failingHeld: Bool) async {
        await withCheckedContinuation { continuation in
            let accepted = loop.post { [self] in
                stopped.append { continuation.resume() }
                beginStop(grace: grace, failingHeld: failingHeld)
            }
            if !accepted { continuation.resume() }
        }
        loop.stop()
    }

    /// The volume has grown at its store. Connections of the kernel may use the new size when this returns; clients of
    /// exports keep the one of their handshake.
    func resized() async {
        let size = opened.record.size
        currentExport.withLock { $0.size = size }
        _ = await loop.call { [self] in
            store?.resized(to: size)
            if backend !== store { backend?.resized(to: size) }
            for session in kernel.sessions { session.resized(to: size) }
        }
    }

    /// Nil when the volume has stopped.
    package func status() async -> VolumeLoopStatus? {
        await loop.call { [self] in loopStatus() }
    }

    // MARK: Sessions

    func begin(descriptor: Int32, peer: String, negotiated: Negotiated, leftover: [UInt8]) {
        guard negotiated.export.mapping == export.mapping else {
            Glibc.close(descriptor)
            logger.warning(
                "client refused: its handshake was with a mapping that has ended since", metadata: ["peer": "\(peer)"])
            return
        }
        guard !stopping, peer == KernelSide.peer || sessions.count < maximumSessions else {
            Glibc.close(descriptor)
            logger.warning(
                "client refused: \(stopping ? "the volume is being unmapped" : "\(maximumSessions) are connected")",
                metadata: ["peer": "\(peer)"])
            return
        }
        let session = Session(
            descriptor: descriptor, peer: peer, negotiated: negotiated, loop: loop, buffers: buffers,
            vectors: vectors, target: self)
        do {
            noticeHungUp()
            sessions.append(session)
            try session.start(leftover: leftover)
            if peer == KernelSide.peer {
                kernel.sessions.append(session)
                // It takes replies one by one on a thread of its own, and in a virtual machine a short sleep is a long one.
                session.mayRest = false
            }
            logger.info("client connected", metadata: ["peer": "\(peer)", "connections": "\(sessions.count)"])
            report(.sessions(sessions.count))
        } catch {
            sessions.removeAll { $0 === session }
            logger.warning("client refused: \(error)", metadata: ["peer": "\(peer)"])
        }
        loop.runAgain()
    }

    package func sessionEnded(_ session: Session, reason: String?) {
        // The session is still on the stack; it goes when the turn is over.
        endedSessions.append(session)
        let left = sessions.count - endedSessions.count
        logger.info(
            "client disconnected\(reason.map { ": \($0)" } ?? "")",
            metadata: ["peer": "\(session.peer)", "connections": "\(left)"])
    }

    package func endOfTurn() {
        loop.updateNow()
        var index = 0
        while index < sessions.count {
            sessions[index].endOfTurn()
            index &+= 1
        }
        if !endedSessions.isEmpty { forgetEnded() }
        if leaving.hasWaiting { admitWaiting() }
        if activity != activityAtTimer, quiet?.isArmed == false {
            activityAtTimer = activity
            quiet?.arm(after: 1_000_000_000)
            notice(.busy)
        }
        if watch.timer?.isArmed == false, requests.inUse > 0 || watch.health.isBad { armWatch() }
        if stopping, sessions.isEmpty { finishStop() }
    }

    private func forgetEnded() {
        let ended = endedSessions
        endedSessions = []
        sessions.removeAll { session in ended.contains { $0 === session } }
        activity &+= 1
        report(.sessions(sessions.count))
        haveLeft(ended)
    }

    /// A second without a request: memory that only I/O needs goes back to the system.
    private func quietPassed() {
        guard activity == activityAtTimer else {
            activityAtTimer = activity
            quiet?.arm(after: 1_000_000_000)
            return
        }
        notice(.quiet)
        for session in sessions { session.releaseIdleMemory() }
        buffers.trim()
        pipes?.trim()
    }

    // MARK: The end

    private func beginStop(grace: UInt64, failingHeld: Bool) {
        stopping = true
        for session in sessions { session.drain() }
        endHeld(failingHeld: failingHeld)
        let timer = LoopTimer(loop: loop) { [unowned self] in
            for session in sessions { session.abort("did not take its replies within \(grace) s") }
        }
        timer.arm(after: grace * 1_000_000_000)
        graceTimer = timer
        loop.runAgain()
    }

    private var graceTimer: LoopTimer?

    private func finishStop() {
        guard let store else { return }
        graceTimer?.cancel()
        graceTimer = nil
        quiet?.cancel()
        quiet = nil
        watch.timer?.cancel()
        watch.timer = nil
        store.close()
        self.store = nil
        backend = nil
        loop.unobserve(self)
        for closure in stopped { closure() }
        stopped = []
    }

    // MARK: Requests

    package var maximumInFlight: Int { parts.capacity }

    @inline(__always)
    package func takeRequest() -> UnsafeMutablePointer<Request>? { requests.take() }

    package func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? {
        needsAdmission ? nil : backend?.placement(offset: offset, length: length)
    }

    package func submit(_ request: UnsafeMutablePointer<Request>) {
        if needsAdmission { admit(request) } else { issue(request) }
    }

    package func release(_ request: UnsafeMutablePointer<Request>) {
        count(request)
        freeParts(of: request)
        request.pointee.place = .nowhere
        requests.give(request)
    }

    package func forget(_ request: UnsafeMutablePointer<Request>) {
        request.pointee.place = .nowhere
        requests.give(request)
    }

    @inline(__always)
    private func count(_ request: UnsafeMutablePointer<Request>) {
        activity &+= 1
        let latency = loop.now &- request.pointee.arrival
        let length = UInt64(request.pointee.length)
        switch request.pointee.command {
        case .read:
            counters.reads &+= 1
            counters.bytesRead &+= length
            readLatency.record(latency)
        case .write:
            counters.writes &+= 1
            counters.bytesWritten &+= length
            writeLatency.record(latency)
        case .flush:
            counters.flushes &+= 1
            flushLatency.record(latency)
        case .trim: counters.trims &+= 1
        case .writeZeroes: counters.writeZeroes &+= 1
        case .cache, .blockStatus, .disconnect: counters.others &+= 1
        }
        if request.pointee.status != 0 { counters.errors &+= 1 }
    }

    // MARK: Status

    private func loopStatus() -> VolumeLoopStatus {
        VolumeLoopStatus(
            state: gate.shown, since: gate.since, health: watch.health.state, healthSince: watch.since,
            connections: sessions.count { $0.peer != KernelSide.peer },
            counters: counters, inFlight: requests.inUse, heldBack: heldBack(),
            readLatency: readLatency.summary(), writeLatency: writeLatency.summary(),
            flushLatency: flushLatency.summary(), clients: sessions.map(\.peer).filter { $0 != KernelSide.peer },
            kernelConnections: kernel.sessions.count, answered: activity, cluster: store?.report)
    }
}

/// What a volume tells its manager of its sessions.
package enum SessionEvent: Sendable {
    /// How many there are now.
    case sessions(Int)
    /// A session with the kernel ended by itself.
    case kernelConnectionLost
}

/// What only the loop knows of a volume.
package struct VolumeLoopStatus: Sendable {
    let state: GateState
    let since: Int64
    let health: HealthState
    /// Seconds since 1970 when that was entered.
    let healthSince: Int64
    let connections: Int
    let counters: VolumeCounters
    package let inFlight: Int
    let heldBack: HeldBack
    let readLatency: LatencySummary
    let writeLatency: LatencySummary
    let flushLatency: LatencySummary
    let clients: [String]
    /// Of the device; the closed ones, of which requests may still be in flight, not among them.
    package let kernelConnections: Int
    /// Changes with every request that is answered.
    let answered: UInt64
    let cluster: ClusterReport?
}
