import Backend
import CLinux
import EventLoop
import Glibc
import PureFlash

/// One data connection after its handshake, on the loop of its volume.
final class StoreSession: EventSource {
    /// Most commands from first byte to reply. More than the largest depth: a client may go beyond what it was granted.
    static let maximumInFlight = 256
    /// Payload and read data a connection may hold at a time.
    private static let maximumHeldBytes = 16 << 20
    /// iovecs one `sendmsg` takes (IOV_MAX).
    static let vectorCapacity = 1024
    /// Nanoseconds a client has to take the last reply of a connection that is given up.
    private static let lingering: UInt64 = 5_000_000_000

    let peer: String
    let descriptor: Int32
    private let loop: EventLoop
    private let buffers: BufferPool
    private unowned(unsafe) let volume: StoreVolume
    private let vectors: UnsafeMutablePointer<iovec>

    private var token: EventLoop.Token?
    private var events: UInt32 = 0
    private var input: StreamInput
    /// The write whose payload is received at its place.
    private var placedCommand: StoreCommand?

    /// Commands from parsing to `release`.
    private(set) var inFlight = 0
    private var heldBytes = 0
    /// Commands of this connection so far.
    var commands: UInt64 = 0
    /// Parsing stopped for want of slots or bytes.
    private var paused = false
    /// A reply was queued after which nothing more is heard of the client: what it sends is thrown away.
    private var ending = false
    private var lingerer: LoopTimer?
    private(set) var closed = false

    private var firstReply: UnsafeMutablePointer<StoreSlot>?
    private var lastReply: UnsafeMutablePointer<StoreSlot>?
    /// Bytes of the first reply that are already sent.
    private var sentOfFirst = 0
    private var waitsForRoom = false

    /// On the loop's thread.
    /// - Parameters:
    ///   - descriptor: a connected stream socket, owned by the session from here on.
    ///   - vectors: scratch of `vectorCapacity` iovecs, shared by the sessions of a loop.
    ///   - volume: outlives the session.
    init(
        descriptor: Int32, peer: String, loop: EventLoop, buffers: BufferPool, vectors: UnsafeMutablePointer<iovec>,
        volume: StoreVolume
    ) {
        self.descriptor = descriptor
        self.peer = peer
        self.loop = loop
        self.buffers = buffers
        input = StreamInput(descriptor: descriptor, headerSize: StoreCommand.size, buffers: buffers)
        self.vectors = vectors
        self.volume = volume
    }

    /// Throws what the loop says of the descriptor, and then has closed it.
    func start() throws(SystemError) {
        events = EPOLLIN.rawValue | EPOLLRDHUP.rawValue
        do { token = try loop.add(descriptor, events: events, source: self) } catch {
            Glibc.close(descriptor)
            closed = true
            throw error
        }
    }

    /// Whether the client has closed its side. What it sent before is not begun any more then: a write of it could land
    /// after a newer one that it sends on another connection.
    var isClosedByPeer: Bool {
        guard !closed else { return true }
        // The bits of poll(2) are those of epoll.
        var poll = pollfd(fd: descriptor, events: Int16(EPOLLRDHUP.rawValue), revents: 0)
        return Glibc.poll(&poll, 1, 0) > 0
    }

    /// Ends the connection now. What is in flight completes without an answer; what was not begun is dropped.
    /// - Parameter reason: for the log; nil when there is nothing to say.
    func end(_ reason: String?) {
        guard !closed else { return }
        closed = true
        lingerer?.cancel()
        lingerer = nil
        if let token { loop.remove(token, descriptor: descriptor) }
        token = nil
        Glibc.close(descriptor)
        while let slot = firstReply {
            firstReply = slot.pointee.next
            release(slot)
        }
        lastReply = nil
        volume.sessionClosed(self, reason: reason)
        loop.runAgain()
    }

    /// Nothing of a closed session is in flight.
    func free() { input.free() }

    /// Gives the memory of an idle connection back.
    func releaseIdleMemory() { input.releaseIdleMemory() }

    // MARK: Events

    func ready(events ready: UInt32) {
        if ready & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0 {
            return end(ending ? nil : "connection lost")
        }
        if ready & EPOLLRDHUP.rawValue != 0 {
            return end(input.isWithinRequest && !paused ? "the client closed within a command" : nil)
        }
        if ready & EPOLLOUT.rawValue != 0 {
            waitsForRoom = false
            updateEvents()
        }
        guard ready & EPOLLIN.rawValue != 0 else { return }
        if ending { return discard() }
        if paused { return updateEvents() }
        receive()
    }

    private func updateEvents() {
        guard let token, !closed else { return }
        var wanted = EPOLLRDHUP.rawValue
        if !paused { wanted |= EPOLLIN.rawValue }
        if waitsForRoom { wanted |= EPOLLOUT.rawValue }
        guard wanted != events else { return }
        events = wanted
        loop.modify(token, descriptor: descriptor, events: wanted)
    }

    /// Called by the volume at the end of a turn.
    @inline(__always)
    func endOfTurn() {
        if firstReply != nil, !waitsForRoom { sendReplies() }
        if paused { resume() }
    }

    /// When replies have freed slots.
    private func resume() {
        guard inFlight < Self.maximumInFlight, !closed else { return }
        if isClosedByPeer { return end(nil) }
        let before = inFlight
        paused = false
        parse()
        if !paused, events & EPOLLIN.rawValue == 0 { updateEvents() }
        // What was started now has missed the backend's end of turn. Where nothing was, an answer will come.
        if !paused || inFlight != before { loop.runAgain() }
    }

    // MARK: Receiving

    /// One recv per turn: a flood on one connection leaves the others their turn.
    private func receive() {
        guard !input.wantsPlace || place() else { return end("out of memory") }
        let count = input.receive()
        // An error may come behind some bytes, too.
        if let placed = input.placed, placed.own == nil, let command = placedCommand { volume.payloadArrived(command) }
        if count > 0 {
            parse()
        } else if count == 0 {
            end(nil)
        } else if errno != EAGAIN && errno != EINTR {
            end("receive: \(errnoText(errno))")
        }
    }

    /// Has the rest of the command at the front, a large write, received at its place.
    private func place() -> Bool {
        guard let front = input.current?.pointee.front else { return true }
        let command = StoreCommand(decoding: front)
        placedCommand = command
        return input.place(Int(command.length), at: volume.placement(command))
    }

    /// What comes after the last command that is answered.
    private func discard() {
        let count = withUnsafeTemporaryAllocation(byteCount: 65536, alignment: 8) { buffer in
            recv(descriptor, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
        }
        if count == 0 || count < 0 && errno != EAGAIN && errno != EINTR { end(nil) }
    }

    // MARK: Parsing

    /// Handles every whole command that has arrived, as far as there are slots.
    private func parse() {
        while !closed, !ending, let input = input.current {
            self.input.missing = 0
            if let placed = self.input.placed {
                guard placed.left == 0 else { return }
                guard acceptPlaced(placed) else { return pause() }
                continue
            }
            let available = input.pointee.available
            guard available >= StoreCommand.size else {
                if available > 0, !self.input.makeRoom(StoreCommand.size) { end("out of memory") }
                return
            }
            let command = StoreCommand(decoding: input.pointee.front)
            guard command.opcode == StoreCommand.Opcode.write.rawValue else {
                // Whatever it is, there is no payload behind it.
                guard accept(command, input, payload: 0) else { return pause() }
                continue
            }
            guard command.length <= StoreProtocol.maximumTransfer else {
                // Where its payload ends cannot be believed, and so not where the next command begins.
                guard refuse(command, .invalidField) else { return pause() }
                return
            }
            let whole = StoreCommand.size &+ Int(command.length)
            guard available >= whole else {
                self.input.missing = whole &- available
                // A large one gets its place when the rest is received: those before it may have left theirs.
                if !self.input.wantsPlace, !self.input.makeRoom(whole) { end("out of memory") }
                return
            }
            guard accept(command, input, payload: Int(command.length)) else { return pause() }
        }
    }

    private func pause() { paused = true }

    @inline(__always)
    private func take(_ command: StoreCommand) -> UnsafeMutablePointer<StoreSlot>? {
        // A length that is refused holds nothing.
        let held = command.length <= StoreProtocol.maximumTransfer ? Int(command.length) : 0
        guard inFlight < Self.maximumInFlight, heldBytes == 0 || heldBytes &+ held <= Self.maximumHeldBytes,
            let slot = volume.takeSlot()
        else { return nil }
        slot.initialize(to: StoreSlot(command, session: self, slot: slot))
        slot.pointee.held = held
        heldBytes &+= held
        inFlight &+= 1
        commands &+= 1
        return slot
    }

    @inline(__always)
    private func accept(_ command: StoreCommand, _ input: UnsafeMutablePointer<InputBuffer>, payload: Int) -> Bool {
        guard let slot = take(command) else { return false }
        if payload > 0 {
            slot.pointee.io.segment = Segment(
                base: input.pointee.base + (input.pointee.start &+ StoreCommand.size), count: payload)
            slot.pointee.input = input
            input.pointee.references &+= 1
        }
        input.pointee.start &+= StoreCommand.size &+ payload
        volume.begin(slot)
        return true
    }

    private func acceptPlaced(_ placed: PlacedPayload) -> Bool {
        guard let command = placedCommand, let slot = take(command) else { return false }
        slot.pointee.io.segment = Segment(base: placed.base, count: Int(command.length))
        slot.pointee.input = input.takePlaced()
        volume.begin(slot)
        return true
    }

    /// Answers, and hears no more of this client.
    private func refuse(_ command: StoreCommand, _ status: StoreStatus) -> Bool {
        guard let slot = take(command) else { return false }
        slot.pointee.isLast = true
        ending = true
        volume.protocolViolation(self, "a write of \(command.length) bytes")
        volume.answer(slot, status)
        return true
    }

    @inline(__always)
    func release(_ slot: UnsafeMutablePointer<StoreSlot>) {
        inFlight &-= 1
        heldBytes &-= slot.pointee.held
        if slot.pointee.io.ownsBuffer, let buffer = slot.pointee.io.buffer { buffers.free(buffer) }
        if let payload = slot.pointee.input { input.release(payload) }
        volume.give(slot)
    }

    /// A second slot with the same reply, in front of it; nil when there is none. For a fault switch.
    func duplicate(_ slot: UnsafeMutablePointer<StoreSlot>) -> UnsafeMutablePointer<StoreSlot>? {
        guard let copy = volume.takeSlot() else { return nil }
        copy.initialize(to: slot.pointee)
        copy.pointee.input = nil
        copy.pointee.io.ownsBuffer = false
        copy.pointee.held = 0
        inFlight &+= 1
        return copy
    }

    // MARK: Replies

    /// Queues the reply; it is sent at the end of the turn together with the others.
    @inline(__always)
    func enqueue(_ slot: UnsafeMutablePointer<StoreSlot>) {
        guard !closed, lingerer == nil else { return release(slot) }
        slot.pointee.next = nil
        if let lastReply { lastReply.pointee.next = slot } else { firstReply = slot }
        lastReply = slot
    }

    /// Sends as many replies as the socket takes.
    private func sendReplies() {
        while firstReply != nil {
            let unsent = gather()
            let sent = unsent.send(to: descriptor)
            if sent < 0 {
                if errno == EINTR { continue }
                guard errno == EAGAIN else { return end("send: \(errnoText(errno))") }
                waitsForRoom = true
                return updateEvents()
            }
            consume(sent)
            guard !closed else { return }
            if sent < unsent.bytes {
                waitsForRoom = true
                return updateEvents()
            }
        }
    }

    /// Lays the unsent bytes of the queued replies out in `vectors`.
    @inline(__always)
    private func gather() -> Gathering {
        var gathering = Gathering(vectors, capacity: Self.vectorCapacity, sent: sentOfFirst)
        var next = firstReply
        while let slot = next, gathering.room >= 2 {
            gathering.add(UnsafeMutableRawPointer(slot), slot.pointee.replyCount)
            if slot.pointee.dataCount > 0 { gathering.add(slot.pointee.io.segment.base, slot.pointee.dataCount) }
            next = slot.pointee.next
        }
        return gathering
    }

    /// Frees the replies that are wholly sent.
    @inline(__always)
    private func consume(_ sent: Int) {
        var left = sent &+ sentOfFirst
        while let slot = firstReply, left >= slot.pointee.replyCount &+ slot.pointee.dataCount {
            left &-= slot.pointee.replyCount &+ slot.pointee.dataCount
            firstReply = slot.pointee.next
            // Freeing it may let others go on, which may be answered at once: the queue is in order before.
            if firstReply == nil { lastReply = nil }
            let isLast = slot.pointee.isLast
            release(slot)
            if isLast { return linger() }
        }
        sentOfFirst = left
    }

    /// The last reply is out. Closing with unread bytes would reset the connection, and take the reply from the client.
    private func linger() {
        ending = true
        sentOfFirst = 0
        while let slot = firstReply {
            firstReply = slot.pointee.next
            release(slot)
        }
        lastReply = nil
        shutdown(descriptor, Int32(SHUT_WR))
        let timer = LoopTimer(loop: loop) { [unowned self] in end(nil) }
        timer.arm(after: Self.lingering)
        lingerer = timer
    }
}
