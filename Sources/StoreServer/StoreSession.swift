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
    /// From this payload on, the rest of a write is received alone, at its place or in one piece, so that it is never
    /// moved.
    private static let largePayload = 32 << 10
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
    private var input: UnsafeMutablePointer<StoreInput>?
    /// Bytes that must arrive before the command at the front is whole; 0 when its head is not there yet.
    private var missing = 0
    private var placement: StorePlacement?

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
    func free() {
        if let input { buffers.free(input.pointee.buffer) }
        input = nil
        if let own = placement?.own { buffers.free(own.pointee.buffer) }
        placement = nil
    }

    /// Gives the memory of an idle connection back.
    func releaseIdleMemory() {
        guard let input, input.pointee.available == 0, input.pointee.references == 0 else { return }
        buffers.free(input.pointee.buffer)
        self.input = nil
    }

    // MARK: Events

    func ready(events ready: UInt32) {
        if ready & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0 {
            return end(ending ? nil : "connection lost")
        }
        if ready & EPOLLRDHUP.rawValue != 0 {
            let within = placement != nil || (input?.pointee.available ?? 0) > 0 && !paused
            return end(within ? "the client closed within a command" : nil)
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
        paused = false
        parse()
        if !paused, events & EPOLLIN.rawValue == 0 { updateEvents() }
        // What was started now has missed the backend's end of turn.
        loop.runAgain()
    }

    // MARK: Receiving

    /// One recv per turn: a flood on one connection leaves the others their turn.
    private func receive() {
        guard let input = roomToReceive() else { return end("out of memory") }
        var count: Int
        if let left = placement?.left, left > 0 {
            count = receiveInPlace(left, input)
        } else {
            var limit = input.pointee.room
            if missing > Self.largePayload { limit = min(limit, missing &+ StoreCommand.size) }
            count = recv(descriptor, input.pointee.base + input.pointee.end, limit, Int32(MSG_DONTWAIT))
            if count > 0 { input.pointee.end &+= count }
        }
        if count > 0 {
            parse()
        } else if count == 0 {
            end(nil)
        } else if errno != EAGAIN && errno != EINTR {
            end("receive: \(errnoText(errno))")
        }
    }

    /// The rest of a payload at its place, and the next command behind it in the input.
    private func receiveInPlace(_ left: Int, _ input: UnsafeMutablePointer<StoreInput>) -> Int {
        guard let placement else { return 0 }
        vectors[0] = iovec(iov_base: placement.base + placement.received, iov_len: left)
        vectors[1] = iovec(
            iov_base: input.pointee.base + input.pointee.end, iov_len: min(input.pointee.room, StoreCommand.size))
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = 2
        let count = recvmsg(descriptor, &message, Int32(MSG_DONTWAIT))
        if count > 0 {
            self.placement?.received += min(count, left)
            input.pointee.end &+= max(count - left, 0)
        }
        return count
    }

    /// What comes after the last command that is answered.
    private func discard() {
        let count = withUnsafeTemporaryAllocation(byteCount: 65536, alignment: 8) { buffer in
            recv(descriptor, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
        }
        if count == 0 || count < 0 && errno != EAGAIN && errno != EINTR { end(nil) }
    }

    private func roomToReceive() -> UnsafeMutablePointer<StoreInput>? {
        guard let input else { return needInput(StoreInput.usualCapacity) }
        if input.pointee.available == 0 {
            if input.pointee.references == 0 {
                input.pointee.start = 0
                input.pointee.end = 0
                return input
            }
            if input.pointee.room < input.pointee.capacity / 4 { return replaceInput(StoreInput.usualCapacity) }
        }
        return input.pointee.room > 0 ? input : replaceInput(StoreInput.usualCapacity)
    }

    private func needInput(_ count: Int) -> UnsafeMutablePointer<StoreInput>? {
        if let input { return input }
        input = StoreInput.allocate(count, from: buffers)
        return input
    }

    /// A new current input that begins with what is unparsed in the old one.
    private func replaceInput(_ count: Int) -> UnsafeMutablePointer<StoreInput>? {
        let old = input
        input = nil
        guard let new = needInput(count) else {
            input = old
            return nil
        }
        guard let old else { return new }
        let rest = old.pointee.available
        new.pointee.base.copyMemory(from: old.pointee.base + old.pointee.start, byteCount: rest)
        new.pointee.end = rest
        old.pointee.start = old.pointee.end
        if old.pointee.references == 0 { buffers.free(old.pointee.buffer) }
        return new
    }

    /// Makes sure that `count` bytes from the first unparsed one fit in one piece. A whole command fits every input.
    private func makeRoom(_ count: Int) -> Bool {
        guard let input else { return false }
        if input.pointee.capacity &- input.pointee.start >= count { return true }
        if input.pointee.references == 0 {
            let rest = input.pointee.available
            memmove(input.pointee.base, input.pointee.base + input.pointee.start, rest)
            input.pointee.start = 0
            input.pointee.end = rest
            return true
        }
        return replaceInput(StoreInput.usualCapacity) != nil
    }

    // MARK: Parsing

    /// Handles every whole command that has arrived, as far as there are slots.
    private func parse() {
        while !closed, !ending, let input {
            missing = 0
            if let placed = placement {
                guard placed.left == 0 else { return }
                guard acceptPlaced(placed) else { return pause() }
                continue
            }
            let available = input.pointee.available
            guard available >= StoreCommand.size else {
                if available > 0, !makeRoom(StoreCommand.size) { end("out of memory") }
                return
            }
            let command = StoreCommand(decoding: input.pointee.base + input.pointee.start)
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
                missing = whole &- available
                if missing > Self.largePayload, place(command, input) { return }
                if !makeRoom(whole) { end("out of memory") }
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
    private func accept(_ command: StoreCommand, _ input: UnsafeMutablePointer<StoreInput>, payload: Int) -> Bool {
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

    /// Moves what has arrived of a write to its place, or to a piece of memory of its own, where the rest will follow:
    /// aligned, it is copied on at full speed.
    private func place(_ command: StoreCommand, _ input: UnsafeMutablePointer<StoreInput>) -> Bool {
        var own: UnsafeMutablePointer<StoreInput>?
        var base = volume.placement(command)
        if base == nil {
            own = StoreInput.allocate(Int(command.length), from: buffers)
            base = own?.pointee.base
        }
        guard let base else { return false }
        let received = input.pointee.available &- StoreCommand.size
        base.copyMemory(from: input.pointee.base + (input.pointee.start &+ StoreCommand.size), byteCount: received)
        input.pointee.start = input.pointee.end
        placement = StorePlacement(command: command, base: base, received: received, own: own)
        missing = 0
        return true
    }

    private func acceptPlaced(_ placed: StorePlacement) -> Bool {
        guard let slot = take(placed.command) else { return false }
        placement = nil
        slot.pointee.io.segment = Segment(base: placed.base, count: Int(placed.command.length))
        slot.pointee.input = placed.own
        placed.own?.pointee.references = 1
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
        if let input = slot.pointee.input {
            input.pointee.references &-= 1
            if input.pointee.references == 0, input != self.input { buffers.free(input.pointee.buffer) }
        }
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
            let (count, bytes) = gather()
            var message = msghdr()
            message.msg_iov = vectors
            message.msg_iovlen = count
            let sent = sendmsg(descriptor, &message, Int32(MSG_NOSIGNAL | MSG_DONTWAIT))
            if sent < 0 {
                if errno == EINTR { continue }
                guard errno == EAGAIN else { return end("send: \(errnoText(errno))") }
                waitsForRoom = true
                return updateEvents()
            }
            consume(sent)
            guard !closed else { return }
            if sent < bytes {
                waitsForRoom = true
                return updateEvents()
            }
        }
    }

    /// Lays the unsent bytes of the queued replies out in `vectors`.
    @inline(__always)
    private func gather() -> (count: Int, bytes: Int) {
        var count = 0
        var bytes = 0
        var skip = sentOfFirst
        var next = firstReply
        while let slot = next, count < Self.vectorCapacity &- 1 {
            add(UnsafeMutableRawPointer(slot), slot.pointee.replyCount, &skip, &count, &bytes)
            if slot.pointee.dataCount > 0 {
                add(slot.pointee.io.segment.base, slot.pointee.dataCount, &skip, &count, &bytes)
            }
            next = slot.pointee.next
        }
        return (count, bytes)
    }

    @inline(__always)
    private func add(
        _ base: UnsafeMutableRawPointer, _ length: Int, _ skip: inout Int, _ count: inout Int, _ bytes: inout Int
    ) {
        if skip >= length {
            skip &-= length
            return
        }
        vectors[count] = iovec(iov_base: base + skip, iov_len: length &- skip)
        bytes &+= length &- skip
        skip = 0
        count &+= 1
    }

    /// Frees the replies that are wholly sent.
    @inline(__always)
    private func consume(_ sent: Int) {
        var left = sent &+ sentOfFirst
        while let slot = firstReply, left >= slot.pointee.replyCount &+ slot.pointee.dataCount {
            left &-= slot.pointee.replyCount &+ slot.pointee.dataCount
            firstReply = slot.pointee.next
            let isLast = slot.pointee.isLast
            release(slot)
            if isLast { return linger() }
        }
        if firstReply == nil { lastReply = nil }
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
