import Backend
import CLinux
import EventLoop
import Glibc
import Logging
import PureFlash
import Synchronization

/// A prepared volume: its loop, its connections, and the checks on the way of each command to the backend. Everything
/// but `start`, `attach`, `update` and `stop` runs on the loop.
final class StoreVolume: BackendClient, TurnObserver, @unchecked Sendable {
    /// Connections at a time. One more gets a good handshake and is closed.
    static let maximumSessions = 64
    /// Nanoseconds after which a snapshot that nobody reads is closed, with and without a client of the volume.
    private static let snapshotTime = (UInt64(60_000_000_000), UInt64(5_000_000_000))

    let name: String
    /// Another one after a snapshot was made.
    var opened: any OpenVolume { currentlyOpened.withLock { $0 } }
    private let currentlyOpened: Mutex<any OpenVolume>
    private let loop: EventLoop
    private let logger: Logger
    /// Nil unless the process was started for tests.
    private let faults: Faults?
    private let durable: Bool

    // The loop's state.
    private var layout: StoreLayout
    private let buffers = BufferPool(maximumRegions: maximumSessions + 4)
    private var backend: (any Backend)?
    /// What no I/O of the backend may cross, bytes; 0 for nothing.
    private var boundary: UInt64 = 0
    /// Of commands that cross it. A command has at most three, since layers have clusters of 64 KiB.
    private var parts: Slab<IO>
    var maximumInFlight: Int { slots.capacity + parts.capacity }
    /// By number.
    private var snapshots: [UInt32: Snapshot] = [:]
    /// I/O begun and not completed.
    private var atBackend = 0
    /// Commands wait: the store is being exchanged.
    private var isHeld = false
    private var idle: (@Sendable () -> Void)?
    private let vectors: UnsafeMutablePointer<iovec>
    private var slots: Slab<StoreSlot>
    private var sessions: ContiguousArray<StoreSession> = []
    /// Connections whose handshake is answered when nothing of closed ones is in flight.
    private var newcomers: [Newcomer] = []
    private var anyClosed = false
    private var firstDelayed: UnsafeMutablePointer<StoreSlot>?
    private var lastDelayed: UnsafeMutablePointer<StoreSlot>?
    private var delay: LoopTimer?
    private var quiet: LoopTimer?
    /// Runs while there are open snapshots.
    private var snapshotTimer: LoopTimer?
    /// Closes the files of those that were dropped.
    private var closing: Task<Void, Never>?
    private var begun: UInt64 = 0
    private var begunAtTimer: UInt64 = 0
    private var stopping = false
    private var stopped: (@Sendable () -> Void)?

    private final class Snapshot {
        let opened: any OpenVolume
        let backend: any Backend
        /// I/O begun and not completed.
        var atBackend = 0
        /// When it was opened or read: nanoseconds of the loop's `now`.
        var lastUse: UInt64

        init(_ opened: any OpenVolume, _ backend: any Backend, now: UInt64) {
            self.opened = opened
            self.backend = backend
            lastUse = now
        }
    }

    private struct Newcomer {
        var descriptor: Int32
        var peer: String
        var handshake: StoreHandshake
    }

    private init(
        name: String, opened: any OpenVolume, layout: StoreLayout, durable: Bool, faults: Faults?, loop: EventLoop,
        logger: Logger
    ) throws(SystemError) {
        self.name = name
        currentlyOpened = Mutex(opened)
        self.layout = layout
        self.durable = durable
        self.faults = faults
        self.loop = loop
        self.logger = logger
        slots = try Slab(of: Self.maximumSessions * StoreSession.maximumInFlight)
        parts = try Slab(of: 3 * Self.maximumSessions * StoreSession.maximumInFlight)
        vectors = .allocate(capacity: StoreSession.vectorCapacity)
    }

    deinit { vectors.deallocate() }

    // MARK: From any thread

    /// Starts a loop for an open volume; blocks until it runs. On an error the open volume is still the caller's.
    /// - Parameter durable: acknowledge writes only when they are on stable storage.
    static func start(
        name: String, opened: any OpenVolume, layout: StoreLayout, durable: Bool, faults: Faults?, logger: Logger
    ) async throws(BackendError) -> StoreVolume {
        let loop: EventLoop
        do { loop = try EventLoop(name: "store:\(name)") } catch { throw BackendError(error) }
        let volume: StoreVolume
        do {
            volume = try StoreVolume(
                name: name, opened: opened, layout: layout, durable: durable, faults: faults, loop: loop, logger: logger
            )
        } catch {
            loop.stop()
            throw BackendError(error)
        }
        if let failure = await loop.call({ volume.begin() }) ?? nil {
            loop.stop()
            throw failure
        }
        return volume
    }

    private func begin() -> BackendError? {
        do { try startBackend(opened) } catch { return error }
        quiet = LoopTimer(loop: loop) { [unowned self] in quietPassed() }
        delay = LoopTimer(loop: loop) { [unowned self] in runDelayed() }
        snapshotTimer = LoopTimer(loop: loop) { [unowned self] in closeUnreadSnapshots() }
        loop.observe(self)
        return nil
    }

    private func startBackend(_ opened: any OpenVolume) throws(BackendError) {
        let backend = try opened.start(on: loop, buffers: buffers, client: self)
        boundary = backend.geometry.transferBoundary
        self.backend = backend
    }

    /// Serves a connection that has sent a good handshake; it is answered here.
    func attach(descriptor: Int32, peer: String, handshake: StoreHandshake) {
        let accepted = loop.post { [self] in
            dropClosed()
            guard !stopping, newcomers.count < Self.maximumSessions else {
                Glibc.close(descriptor)
                return
            }
            newcomers.append(Newcomer(descriptor: descriptor, peer: peer, handshake: handshake))
            admitNewcomers()
        }
        if !accepted { Glibc.close(descriptor) }
    }

    /// Takes over what the conductor says.
    func update(_ layout: StoreLayout) async {
        _ = await loop.call { [self] in
            self.layout = layout
            if layout.size > backend?.geometry.size ?? 0 { backend?.resized(to: layout.size) }
        }
    }

    func setMetaVersion(_ version: UInt16) async {
        _ = await loop.call { [self] in layout.metaVersion = version }
    }

    func metaVersion() async -> UInt16 { await loop.call { [self] in layout.metaVersion } ?? 0 }

    /// Connections now.
    func connections() async -> Int {
        await loop.call { [self] in
            dropClosed()
            return sessions.count { !$0.closed } + newcomers.count
        } ?? 0
    }

    /// A fault switch was turned.
    func faultsChanged() {
        loop.post { [self] in runDelayed() }
    }

    /// Ends the connections, lets what is in flight finish, and ends the loop.
    func stop() async {
        await withCheckedContinuation { continuation in
            let accepted = loop.post { [self] in
                stopping = true
                stopped = { continuation.resume() }
                for session in sessions { session.end(nil) }
                for newcomer in newcomers { Glibc.close(newcomer.descriptor) }
                newcomers = []
                loop.runAgain()
            }
            if !accepted { continuation.resume() }
        }
        loop.stop()
        // The loop has ended: what was its own is whose this is.
        await closing?.value
        let files = snapshots.values.map(\.opened) + [opened]
        await Aside.always { for opened in files { opened.close() } }
    }

    // MARK: Snapshots

    /// Whether a snapshot can be read; it stays so for some seconds.
    func hasSnapshot(_ number: UInt32) async -> Bool {
        await loop.call { [self] in
            snapshots[number]?.lastUse = loop.now
            return snapshots[number] != nil
        } ?? false
    }

    /// Lets a snapshot be read. On an error it is still the caller's.
    func add(_ snapshot: any OpenVolume, number: UInt32) async throws(BackendError) {
        let failure = await loop.call { [self] () -> BackendError? in
            do throws(BackendError) {
                let backend = try snapshot.start(on: loop, buffers: buffers, client: self)
                snapshots[number] = Snapshot(snapshot, backend, now: loop.now)
                if snapshotTimer?.isArmed == false { snapshotTimer?.arm(after: Self.snapshotTime.1) }
                putLast()
                return nil
            } catch { return error }
        }
        if let failure = failure ?? nil { throw failure }
    }

    /// Closes a snapshot that is to be deleted. EBUSY while it is read.
    func remove(_ number: UInt32) async throws(BackendError) {
        let result = await loop.call { [self] () -> Result<(any OpenVolume)?, BackendError> in
            guard let snapshot = snapshots[number] else { return .success(nil) }
            guard snapshot.atBackend == 0 else {
                return .failure(BackendError(code: EBUSY, message: "snapshot \(number) of \(name) is being read"))
            }
            snapshots[number] = nil
            snapshot.backend.close()
            return .success(snapshot.opened)
        }
        guard let opened = try result?.get() ?? nil else { return }
        await Aside.always { opened.close() }
    }

    /// Merges what deleted snapshots have left, as far as it lies in the files of this volume.
    func tidy() async throws(BackendError) -> Bool {
        let opened = opened
        guard let due = try await Aside.run({ () throws(BackendError) in try opened.dueChange() }) else { return false }
        try await change(due)
        return true
    }

    /// Each holds a descriptor for every layer below it. Who reads it again is told to open it again.
    private func closeUnreadSnapshots() {
        let isConnected = !newcomers.isEmpty || sessions.contains { !$0.closed }
        let limit = isConnected ? Self.snapshotTime.0 : Self.snapshotTime.1
        for (number, snapshot) in snapshots
        where snapshot.atBackend == 0 && loop.now &- snapshot.lastUse >= limit {
            snapshots[number] = nil
            snapshot.backend.close()
            let opened = snapshot.opened
            closing = Task { [closing] in
                await closing?.value
                await Aside.always { opened.close() }
            }
            logger.debug("closed snapshot \(number) of \(name), which nobody reads")
        }
        if !snapshots.isEmpty { snapshotTimer?.arm(after: Self.snapshotTime.1) }
    }

    /// Seconds that commands may be held back for a snapshot.
    private static let holdLimit: UInt64 = 15

    /// Has the store changed, as a snapshot of all that was acknowledged; commands wait meanwhile, for a limited time.
    func change(_ change: StoreChange) async throws(BackendError) {
        let old = opened
        // While I/O still runs, so that less is left for the pause; and before the pool is locked, for others' sake.
        try await Aside.run { () throws(BackendError) in try old.settle() }
        let prepared = try await old.prepare(change, Patience())
        var failure: BackendError?
        do throws(BackendError) {
            try await Aside.run { () throws(BackendError) in try old.settle() }
            try await exchange(old, prepared)
        } catch { failure = error }
        do throws(BackendError) {
            try await Aside.run { () throws(BackendError) in try prepared.finish() }
        } catch { failure = failure ?? error }
        if let failure { throw failure }
    }

    private func exchange(_ old: any OpenVolume, _ prepared: any PreparedChange) async throws(BackendError) {
        await withCheckedContinuation { continuation in
            let accepted = loop.post { [self] in
                isHeld = true
                idle = { continuation.resume() }
                if atBackend == 0 { becomeIdle() }
            }
            if !accepted { continuation.resume() }
        }
        _ = await loop.call { [self] in
            backend?.close()
            backend = nil
        }
        var failure: BackendError?
        var next = old
        do throws(BackendError) { next = try await prepared.apply(within: Self.holdLimit, self.name) } catch {
            failure = error
        }
        let now = next
        let notStarted = await loop.call { [self] () -> BackendError? in
            defer {
                isHeld = false
                runDelayed()
            }
            if now === old { old.changeGivenUp() }
            do throws(BackendError) {
                try startBackend(now)
                putLast()
                return nil
            } catch { return error }
        }
        if now !== old {
            currentlyOpened.withLock { $0 = now }
            await Aside.always { old.close() }
        }
        if let error = failure ?? notStarted ?? nil { throw error }
    }

    /// What a backend completes at its end of turn is answered in the same turn.
    private func putLast() {
        loop.unobserve(self)
        loop.observe(self)
    }

    private func becomeIdle() {
        idle?()
        idle = nil
    }

    // MARK: Connections

    /// Ends the connections whose client is gone, whether their events have come up or not.
    private func dropClosed() {
        for session in sessions where session.isClosedByPeer { session.end(nil) }
    }

    /// What closed connections left in flight comes first: a write that a new one brings must not be overtaken.
    private func admitNewcomers() {
        guard !newcomers.isEmpty, !sessions.contains(where: { $0.closed && $0.inFlight > 0 }) else { return }
        for newcomer in newcomers { admit(newcomer) }
        newcomers = []
    }

    private func admit(_ newcomer: Newcomer) {
        var answer = newcomer.handshake
        answer.result = 0
        let full = sessions.count { !$0.closed } >= Self.maximumSessions
        guard !stopping, Self.send(answer, to: newcomer.descriptor), !full, faults?.admit() ?? true else {
            if full { logger.warning("\(newcomer.peer): refused, \(Self.maximumSessions) are connected to \(name)") }
            Glibc.close(newcomer.descriptor)
            return
        }
        let session = StoreSession(
            descriptor: newcomer.descriptor, peer: newcomer.peer, loop: loop, buffers: buffers, vectors: vectors,
            volume: self)
        do {
            try session.start()
            sessions.append(session)
            logger.debug("\(newcomer.peer): connected to \(name)")
        } catch {
            faults?.dismiss()
            logger.warning("\(newcomer.peer): \(error)")
        }
    }

    /// On a socket nothing was sent on yet, so that it fits its buffer.
    static func send(_ handshake: StoreHandshake, to descriptor: Int32) -> Bool {
        withUnsafeTemporaryAllocation(byteCount: StoreHandshake.size, alignment: 8) { bytes in
            guard let base = bytes.baseAddress else { return false }
            handshake.encode(to: base)
            return Glibc.send(descriptor, base, bytes.count, Int32(MSG_NOSIGNAL | MSG_DONTWAIT)) == bytes.count
        }
    }

    func sessionClosed(_ session: StoreSession, reason: String?) {
        anyClosed = true
        faults?.dismiss()
        dropDelayed(of: session)
        if let reason {
            logger.info("\(session.peer): connection to \(name) ended: \(reason)")
        } else {
            logger.debug("\(session.peer): disconnected from \(name)")
        }
    }

    func protocolViolation(_ session: StoreSession, _ what: String) {
        logger.warning("\(session.peer): \(what) is against the protocol; closing the connection to \(name)")
    }

    func endOfTurn() {
        loop.updateNow()
        var index = 0
        while index < sessions.count {
            sessions[index].endOfTurn()
            index &+= 1
        }
        if anyClosed { forgetClosed() }
        if begun != begunAtTimer, quiet?.isArmed == false {
            begunAtTimer = begun
            quiet?.arm(after: 1_000_000_000)
        }
        if stopping, sessions.isEmpty { finishStop() }
    }

    private func forgetClosed() {
        for session in sessions where session.closed && session.inFlight == 0 { session.free() }
        sessions.removeAll { $0.closed && $0.inFlight == 0 }
        anyClosed = sessions.contains { $0.closed }
        admitNewcomers()
    }

    /// A second without a command: memory that only I/O needs goes back to the system.
    private func quietPassed() {
        guard begun == begunAtTimer else {
            begunAtTimer = begun
            quiet?.arm(after: 1_000_000_000)
            return
        }
        for session in sessions { session.releaseIdleMemory() }
        buffers.trim()
    }

    private func finishStop() {
        quiet?.cancel()
        delay?.cancel()
        snapshotTimer?.cancel()
        backend?.close()
        backend = nil
        for snapshot in snapshots.values { snapshot.backend.close() }
        loop.unobserve(self)
        stopped?()
        stopped = nil
    }

    // MARK: Commands

    @inline(__always)
    func takeSlot() -> UnsafeMutablePointer<StoreSlot>? { slots.take() }

    @inline(__always)
    func give(_ slot: UnsafeMutablePointer<StoreSlot>) { slots.give(slot) }

    /// Where the payload of a write that passes may be received straight away.
    func placement(_ command: StoreCommand) -> UnsafeMutableRawPointer? {
        guard faults == nil, !isHeld, judge(command) == .success else { return nil }
        return backend?.placement(offset: command.offset, length: command.length)
    }

    /// Some of that payload has arrived there.
    func payloadArrived(_ command: StoreCommand) {
        backend?.payloadArrived(offset: command.offset, length: command.length)
    }

    @inline(__always)
    func begin(_ slot: UnsafeMutablePointer<StoreSlot>) {
        begun &+= 1
        if isHeld { return hold(slot) }
        if faults != nil, faulted(slot) { return }
        issue(slot)
    }

    @inline(__always)
    private func issue(_ slot: UnsafeMutablePointer<StoreSlot>) {
        let verdict = judge(slot.pointee.command)
        guard verdict == .success, slot.pointee.command.length > 0 else { return answer(slot, verdict) }
        slot.pointee.io.durable = durable
        let snapshot = slot.pointee.command.snapshot
        guard snapshot == StoreProtocol.head else {
            guard let found = snapshots[snapshot] else { return answer(slot, .ioError) }
            found.lastUse = loop.now
            return submit(slot, to: found.backend, boundary: found.backend.geometry.transferBoundary)
        }
        guard let backend else { return answer(slot, .ioError) }
        submit(slot, to: backend, boundary: boundary)
    }

    @inline(__always)
    private func submit(_ slot: UnsafeMutablePointer<StoreSlot>, to backend: any Backend, boundary: UInt64) {
        let command = slot.pointee.command
        guard boundary == 0 || command.offset & (boundary &- 1) &+ UInt64(command.length) <= boundary else {
            return submitParts(slot, to: backend, boundary: boundary)
        }
        tally(slot, 1)
        backend.submit(withUnsafeMutablePointer(to: &slot.pointee.io) { $0 })
    }

    @inline(__always)
    private func tally(_ slot: UnsafeMutablePointer<StoreSlot>, _ change: Int) {
        atBackend &+= change
        guard slot.pointee.command.snapshot != StoreProtocol.head else { return }
        snapshots[slot.pointee.command.snapshot]?.atBackend &+= change
    }

    /// One after the other, none of which crosses the boundary. The data of a read is put together in a buffer of the
    /// slot's.
    private func submitParts(_ slot: UnsafeMutablePointer<StoreSlot>, to backend: any Backend, boundary: UInt64) {
        let whole = slot.pointee.io
        if whole.operation == .read {
            guard let buffer = buffers.allocate(Int(whole.length)) else { return answer(slot, .ioError) }
            slot.pointee.io.buffer = buffer
            slot.pointee.io.ownsBuffer = true
            slot.pointee.io.segment.base = buffer.base
            slot.pointee.io.segment.count = Int(whole.length)
        }
        let end = whole.offset &+ UInt64(whole.length)
        let count = (end &- 1) / boundary &- whole.offset / boundary &+ 1
        guard let number = UInt8(exactly: count) else { return answer(slot, .ioError) }
        slot.pointee.parts = number
        tally(slot, Int(count))
        var offset = whole.offset
        while offset < end {
            let length = min(boundary &- offset & (boundary &- 1), end &- offset)
            guard let part = parts.take() else {
                // As many as there can be are there.
                preconditionFailure("more parts than commands have")
            }
            part.initialize(
                to: IO(
                    operation: whole.operation, offset: offset, length: UInt32(length),
                    request: UnsafeMutableRawPointer(slot)))
            part.pointee.durable = whole.durable
            if whole.operation == .write {
                part.pointee.segment.base = whole.segment.base + Int(offset &- whole.offset)
                part.pointee.segment.count = Int(length)
            }
            offset &+= length
            backend.submit(part)
        }
    }

    /// - Returns: whether it was the last one.
    private func partCompleted(_ part: UnsafeMutablePointer<IO>, _ slot: UnsafeMutablePointer<StoreSlot>) -> Bool {
        if part.pointee.status != 0 {
            slot.pointee.io.status = part.pointee.status
        } else if part.pointee.operation == .read {
            let place = slot.pointee.io.segment.base + Int(part.pointee.offset &- slot.pointee.io.offset)
            place.copyMemory(from: part.pointee.segment.base, byteCount: Int(part.pointee.length))
        }
        if part.pointee.ownsBuffer, let buffer = part.pointee.buffer { buffers.free(buffer) }
        parts.give(part)
        slot.pointee.parts &-= 1
        return slot.pointee.parts == 0
    }

    @inline(__always)
    private func judge(_ command: StoreCommand) -> StoreStatus {
        layout.verdict(on: command) { snapshots[$0]?.backend.geometry.size }
    }

    func completed(_ io: UnsafeMutablePointer<IO>) {
        let slot = io.pointee.request.assumingMemoryBound(to: StoreSlot.self)
        tally(slot, -1)
        if idle != nil, atBackend == 0 { becomeIdle() }
        if slot.pointee.parts > 0, !partCompleted(io, slot) { return }
        guard slot.pointee.io.status == 0 else { return failed(slot) }
        answer(slot, .success)
    }

    private func failed(_ slot: UnsafeMutablePointer<StoreSlot>) {
        let code = slot.pointee.io.status
        let io = slot.pointee.io
        logger.error("\(name): \(io.operation) of \(io.length) bytes at \(io.offset): \(errnoText(code))")
        switch code {
        case ENOSPC, EDQUOT: answer(slot, .noSpace)
        case EROFS: answer(slot, .readOnly)
        default: answer(slot, .ioError)
        }
    }

    @inline(__always)
    func answer(_ slot: UnsafeMutablePointer<StoreSlot>, _ status: StoreStatus) {
        var reply = StoreReply(
            status: status, id: slot.pointee.command.id, sequence: slot.pointee.command.sequence)
        if status.asksToReopen {
            reply.metaVersion = slot.pointee.command.volumeID == layout.id ? layout.metaVersion : .max
        }
        if status == .success, slot.pointee.command.opcode == StoreCommand.Opcode.read.rawValue {
            slot.pointee.dataCount = Int(slot.pointee.command.length)
        }
        slot.pointee.session._withUnsafeGuaranteedRef { session in
            if let faults { spoil(slot, &reply, faults, session) }
            reply.encode(to: UnsafeMutableRawPointer(slot))
            session.enqueue(slot)
        }
    }
}

// MARK: - Faults

extension StoreVolume {
    /// What the switches do to a command that came.
    /// - Returns: whether it was taken care of.
    private func faulted(_ slot: UnsafeMutablePointer<StoreSlot>) -> Bool {
        guard let faults else { return false }
        faults.count(.commands)
        let session = slot.pointee.session.takeUnretainedValue()
        if case let limit = faults.value(.drop), limit > 0, session.commands >= UInt64(limit) {
            session.release(slot)
            session.end("fault: closed after \(session.commands) commands")
            return true
        }
        let isWrite = slot.pointee.command.opcode == StoreCommand.Opcode.write.rawValue
        if faults.spend(.reopen) || isWrite && faults.isOn(.full) {
            answer(slot, StoreStatus.success.withReopen)
            return true
        }
        if isWrite, slot.pointee.command.snapshot == StoreProtocol.head, faults.spend(.readOnly) {
            answer(slot, .readOnly)
            return true
        }
        let wait = UInt64(faults.value(.delay)) * 1_000_000
        guard wait > 0 || faults.value(.stop) > 0 || firstDelayed != nil else { return false }
        slot.pointee.due = loop.now &+ wait
        hold(slot)
        runDelayed()
        return true
    }

    private func hold(_ slot: UnsafeMutablePointer<StoreSlot>) {
        slot.pointee.next = nil
        if let lastDelayed { lastDelayed.pointee.next = slot } else { firstDelayed = slot }
        lastDelayed = slot
    }

    private func runDelayed() {
        guard !isHeld, faults?.value(.stop) ?? 0 == 0 else { return }
        loop.updateNow()
        while let slot = firstDelayed {
            guard slot.pointee.due <= loop.now || faults?.value(.delay) ?? 0 == 0 else {
                delay?.arm(after: slot.pointee.due &- loop.now)
                return
            }
            firstDelayed = slot.pointee.next
            if firstDelayed == nil { lastDelayed = nil }
            issue(slot)
        }
        loop.runAgain()
    }

    private func dropDelayed(of session: StoreSession) {
        var slot = firstDelayed
        firstDelayed = nil
        lastDelayed = nil
        while let current = slot {
            slot = current.pointee.next
            guard current.pointee.session.takeUnretainedValue() !== session else {
                session.release(current)
                continue
            }
            hold(current)
        }
    }

    /// What the switches do to a reply.
    private func spoil(
        _ slot: UnsafeMutablePointer<StoreSlot>, _ reply: inout StoreReply, _ faults: Faults, _ session: StoreSession
    ) {
        if faults.spend(.wrongID) { reply.id ^= 0x8000 }
        if faults.spend(.half) {
            slot.pointee.replyCount = StoreReply.size / 2
            slot.pointee.dataCount = 0
            slot.pointee.isLast = true
        }
        if faults.spend(.twice) {
            reply.encode(to: UnsafeMutableRawPointer(slot))
            if let copy = session.duplicate(slot) { session.enqueue(copy) }
        }
    }
}
