import Backend
import CLinux
import EventLoop
import Glibc

/// One connection of one volume to one store: made at the first request, made again by its volume's word. Replies come in
/// any order; each is matched by id and sequence to a request that is in flight here, and anything else ends the
/// connection.
///
/// A request is sent again only when the connection it was sent on is closed. What the store had not received of it is
/// gone then, and a store of ours throws away what it had received and not begun. PureFlash's own store does not: it may
/// still execute what lay in its socket.
final class StoreConnection: EventSource {
    enum State {
        case closed, connecting, shakingHands, ready
    }

    private static let inputCapacity = 256 << 10
    private static let vectorCapacity = 512
    /// Nanoseconds before a store that had no room is asked again while there are other connections to it.
    private static let rest: UInt64 = 5_000_000_000
    /// Nanoseconds for which the others are used where one was given back.
    private static let longRest: UInt64 = 60_000_000_000

    /// As the conductor names it.
    let name: String
    private let address: StoreAddress
    private let settings: PureFlashSettings
    private let volumeID: UInt64
    private let loop: EventLoop
    private let buffers: BufferPool
    private unowned(unsafe) let owner: PureFlashVolume
    private let vectors: UnsafeMutablePointer<iovec>
    private var patience: LoopTimer?

    private(set) var state = State.closed
    private var descriptor: Int32 = -1
    private var token: EventLoop.Token?
    private var events: UInt32 = 0
    private var input: Buffer?
    private var start = 0
    private var end = 0
    private var handshakeSent = 0

    /// By command id.
    private let slots: UnsafeMutablePointer<UnsafeMutablePointer<StoreRequest>?>
    private let freeIDs: UnsafeMutablePointer<UInt16>
    private var freeCount = 0
    private var depth = 0
    /// Have no id yet.
    private var waiting = StoreQueue()
    /// Have an id and are not wholly in the socket.
    private var sending = StoreQueue()
    private var sentOfFirst = 0
    private var socketIsFull = false
    /// A request that the store may still execute was given up.
    private var hasAbandoned = false
    /// A read whose data is arriving.
    private var reading: UnsafeMutablePointer<StoreRequest>?
    private var readingReply = StoreReply(status: .success, id: 0, sequence: 0)

    /// Requests sent and not answered.
    var inFlight: Int { depth - freeCount }
    var isIdle: Bool { inFlight == 0 && waiting.isEmpty }
    /// How often it failed since its last answer.
    private(set) var failures = 0
    /// How often that was by itself and for another reason than a want of room, in a row.
    private(set) var losses = 0
    /// Why it failed last, until it is there again.
    private(set) var lastFailure: String?
    /// When it failed last, the store had requests of it.
    private(set) var lostRequests = false
    /// A write was among them.
    private(set) var lostWrites = false
    /// Since the handshake.
    private var hasAnswered = false
    /// It failed last because the store does not serve the volume.
    private(set) var wasRefused = false
    /// It failed last because the store had no room for another connection: that closes it right after a good handshake.
    private(set) var wasTurnedAway = false
    /// The store did so twice in a row: it has no room indeed.
    private(set) var hasNoRoom = false
    /// The loop's time before which the other connections to the store are used, if there are any.
    private(set) var restsUntil: UInt64 = 0

    /// Takes no more requests, and ends when those it has are answered.
    private(set) var isRetiring = false

    init(
        name: String, address: StoreAddress, volumeID: UInt64, settings: PureFlashSettings, loop: EventLoop,
        buffers: BufferPool, owner: PureFlashVolume
    ) {
        self.name = name
        self.address = address
        self.volumeID = volumeID
        self.settings = settings
        self.loop = loop
        self.buffers = buffers
        self.owner = owner
        vectors = .allocate(capacity: Self.vectorCapacity)
        slots = .allocate(capacity: StoreProtocol.maximumDepth)
        slots.initialize(repeating: nil, count: StoreProtocol.maximumDepth)
        freeIDs = .allocate(capacity: StoreProtocol.maximumDepth)
    }

    deinit {
        vectors.deallocate()
        slots.deallocate()
        freeIDs.deallocate()
    }

    // MARK: From the volume

    @inline(__always)
    func enqueue(_ request: UnsafeMutablePointer<StoreRequest>) { waiting.append(request) }

    /// At the end of a turn: sends what was queued in it, all together.
    func flush() {
        switch state {
        case .closed, .connecting, .shakingHands: break
        case .ready:
            takeIDs()
            if !sending.isEmpty, !socketIsFull { send() }
        }
    }

    /// Connects, when it is not connected and something waits.
    func connectIfNeeded() {
        guard state == .closed, !waiting.isEmpty else { return }
        do throws(SystemError) { try connect() } catch { fail("\(error)") }
    }

    /// Takes back what waits here and is too old.
    func takeExpired(at now: UInt64, into expired: inout StoreQueue) {
        var found = waiting.removeExpired(at: now)
        while let request = found.removeFirst() { expired.append(request) }
    }

    /// Takes a request back that was not answered in time. Returns false when it is not under way here.
    func forget(_ request: UnsafeMutablePointer<StoreRequest>) -> Bool {
        for index in 0..<depth where slots[index] == request {
            // The store may still execute it. Nothing else may be sent there before its connection is closed.
            release(UInt16(index))
            hasAbandoned = true
            fail("no answer to a request in time")
            return true
        }
        return false
    }

    /// Whether one of those in flight is like that.
    func hasInFlight(where condition: (StoreRequest) -> Bool) -> Bool {
        (0..<depth).contains { index in slots[index].map { condition($0.pointee) } ?? false }
    }

    /// What has waited longest for its answer here.
    func longestInFlight() -> UnsafeMutablePointer<StoreRequest>? {
        (0..<depth).lazy.compactMap { [slots] in slots[$0] }.min { $0.pointee.sent < $1.pointee.sent }
    }

    /// Ends it without a loss; the others to its store do without it for a while.
    func retire() {
        isRetiring = true
        restsUntil = loop.now &+ Self.longRest
        endIfRetired()
    }

    private func endIfRetired() {
        guard isRetiring, isIdle, state == .ready else { return }
        _ = withdraw()
        owner.retired(self)
    }

    /// Moves what waits elsewhere.
    func takeWaiting() -> StoreQueue {
        defer { waiting = StoreQueue() }
        return waiting
    }

    func close() {
        patience?.cancel()
        patience = nil
        if let token { loop.remove(token, descriptor: descriptor) }
        token = nil
        if descriptor >= 0 {
            // What is unsent is thrown away, and the store hears of the end at once, in front of what it has not read.
            if inFlight > 0 || hasAbandoned {
                var now = linger(l_onoff: 1, l_linger: 0)
                setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &now, socklen_t(MemoryLayout<linger>.size))
            }
            Glibc.close(descriptor)
        }
        hasAbandoned = false
        isRetiring = false
        descriptor = -1
        if let input { buffers.free(input) }
        input = nil
        state = .closed
    }

    // MARK: Connecting

    private func connect() throws(SystemError) {
        let socket = try retrying("socket") {
            Glibc.socket(
                address.family, Int32(SOCK_STREAM.rawValue | SOCK_NONBLOCK.rawValue | SOCK_CLOEXEC.rawValue), 0)
        }
        descriptor = socket
        if settings.noDelay { set(Int32(IPPROTO_TCP), TCP_NODELAY, 1) }
        // A host that is gone is noticed though nothing is heard of it; a store that is slow is not.
        set(SOL_SOCKET, SO_KEEPALIVE, 1)
        set(Int32(IPPROTO_TCP), TCP_KEEPIDLE, 5)
        set(Int32(IPPROTO_TCP), TCP_KEEPINTVL, 2)
        // It is no limit for one that reads nothing: the kernel would give up without telling the store, which would go
        // on with what it has when it goes on. The volume gives up earlier, and with a reset.
        set(Int32(IPPROTO_TCP), TCP_USER_TIMEOUT, Int32(clamping: settings.ioTimeout / 1_000_000 + 5000))
        let result = withUnsafePointer(to: address.storage) { storage in
            storage.withMemoryRebound(to: sockaddr.self, capacity: 1) { Glibc.connect(socket, $0, address.length) }
        }
        if result != 0, errno != EINPROGRESS {
            throw SystemError(code: errno, operation: "connect")
        }
        guard let buffer = buffers.allocate(Self.inputCapacity) else {
            throw SystemError(code: ENOMEM, operation: "receive buffer")
        }
        input = buffer
        start = 0
        end = 0
        handshakeSent = 0
        events = EPOLLOUT.rawValue
        token = try loop.add(socket, events: events, source: self)
        state = .connecting
        let timer = LoopTimer(loop: loop) { [unowned self] in
            fail("no handshake within \(settings.connectTimeout / 1_000_000_000) s")
        }
        timer.arm(after: settings.connectTimeout)
        patience = timer
    }

    private func set(_ level: Int32, _ option: Int32, _ value: Int32) {
        var value = value
        // An option that the kernel lacks costs promptness, nothing else.
        setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    private func finishConnecting() {
        var code: Int32 = 0
        var size = socklen_t(MemoryLayout<Int32>.size)
        getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &code, &size)
        guard code == 0 else { return fail("connect: \(errnoText(code))") }
        // Nothing is ever congested between two processes of a host. A way of avoiding it that paces, as BBR does, would
        // spend a quarter of the client's processor time on timers.
        if address.isReachedWithin(descriptor) {
            setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_CONGESTION, "reno", 4)
        }
        state = .shakingHands
        sendHandshake()
    }

    private func sendHandshake() {
        var frame: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
        let message = StoreHandshake(depth: Int16(settings.depth), volumeID: volumeID)
        withUnsafeMutableBytes(of: &frame) { bytes in
            guard let base = bytes.baseAddress else { return }
            message.encode(to: base)
            let sent = Glibc.send(
                descriptor, base + handshakeSent, StoreHandshake.size - handshakeSent,
                Int32(MSG_NOSIGNAL | MSG_DONTWAIT))
            if sent > 0 { handshakeSent += sent } else if errno != EAGAIN, errno != EINTR { code(errno) }
        }
        guard state == .shakingHands else { return }
        wait(for: handshakeSent < StoreHandshake.size ? EPOLLOUT.rawValue | EPOLLIN.rawValue : EPOLLIN.rawValue)
    }

    private func code(_ code: Int32) { ended("send: \(errnoText(code))") }

    private func finishHandshake() {
        guard end - start >= StoreHandshake.size, let input else { return }
        let answer = StoreHandshake(decoding: input.base + start)
        start += StoreHandshake.size
        guard answer.volumeID == volumeID else { return fail("a handshake for another volume") }
        guard answer.result == 0 else {
            return fail(
                "the store refused the volume (\(answer.result)): it does not serve it, or not yet", refused: true)
        }
        guard answer.depth > 0, Int(answer.depth) <= StoreProtocol.maximumDepth else {
            return fail("a handshake with a depth of \(answer.depth)")
        }
        patience?.cancel()
        patience = nil
        // It may grant more than it was asked for.
        depth = min(Int(answer.depth), settings.depth)
        hasAnswered = false
        for index in 0..<depth { freeIDs[index] = UInt16(depth - 1 - index) }
        freeCount = depth
        state = .ready
        lastFailure = nil
        owner.connected(self)
        flush()
    }

    private func wait(for wanted: UInt32) {
        guard let token, wanted != events else { return }
        events = wanted
        loop.modify(token, descriptor: descriptor, events: wanted)
    }

    // MARK: Sending

    @inline(__always)
    private func takeIDs() {
        while freeCount > 0, let request = waiting.removeFirst() {
            freeCount &-= 1
            let id = freeIDs[freeCount]
            slots[Int(id)] = request
            owner.encode(request, id: id)
            request.pointee.sent = loop.now
            request.pointee.isSent = false
            request.pointee.received = 0
            sending.append(request)
        }
    }

    private func send() {
        while let first = sending.first {
            var unsent = Gathering(vectors, capacity: Self.vectorCapacity, sent: sentOfFirst)
            var next: UnsafeMutablePointer<StoreRequest>? = first
            while let request = next, unsent.room >= 2 {
                unsent.add(UnsafeMutableRawPointer(request), StoreCommand.size)
                if request.pointee.isWrite { unsent.add(request.pointee.payload, Int(request.pointee.length)) }
                next = request.pointee.next
            }
            let sent = unsent.send(to: descriptor)
            if sent < 0 {
                if errno == EINTR { continue }
                guard errno == EAGAIN else { return code(errno) }
                socketIsFull = true
                return wait(for: EPOLLIN.rawValue | EPOLLOUT.rawValue)
            }
            consume(sent)
            if sent < unsent.bytes {
                socketIsFull = true
                return wait(for: EPOLLIN.rawValue | EPOLLOUT.rawValue)
            }
        }
    }

    @inline(__always)
    private func consume(_ sent: Int) {
        var left = sent &+ sentOfFirst
        while let request = sending.first {
            let whole = StoreCommand.size &+ (request.pointee.isWrite ? Int(request.pointee.length) : 0)
            guard left >= whole else { break }
            left &-= whole
            request.pointee.isSent = true
            _ = sending.removeFirst()
        }
        sentOfFirst = left
    }

    // MARK: Events

    func ready(events ready: UInt32) {
        switch state {
        case .closed: break
        case .connecting: finishConnecting()
        case .shakingHands:
            if ready & EPOLLOUT.rawValue != 0, handshakeSent < StoreHandshake.size { sendHandshake() }
            if state == .shakingHands, ready & ~EPOLLOUT.rawValue != 0 { receive() }
        case .ready:
            if ready & EPOLLOUT.rawValue != 0 {
                socketIsFull = false
                wait(for: EPOLLIN.rawValue)
                send()
            }
            if state == .ready, ready & ~EPOLLOUT.rawValue != 0 { receive() }
        }
    }

    /// One system call per turn, so that a flood of one store leaves the others their turn.
    private func receive() {
        guard let input else { return }
        if start == end {
            start = 0
            end = 0
        } else if Self.inputCapacity - end < StoreReply.size {
            memmove(input.base, input.base + start, end - start)
            end -= start
            start = 0
        }
        let count: Int
        if let reading {
            let left = Int(reading.pointee.length &- reading.pointee.received)
            vectors[0] = iovec(iov_base: reading.pointee.payload + Int(reading.pointee.received), iov_len: left)
            vectors[1] = iovec(iov_base: input.base + end, iov_len: Self.inputCapacity - end)
            var message = msghdr()
            message.msg_iov = vectors
            message.msg_iovlen = 2
            count = recvmsg(descriptor, &message, Int32(MSG_DONTWAIT))
            if count > 0 {
                reading.pointee.received &+= UInt32(min(count, left))
                end += max(count - left, 0)
            }
        } else {
            count = recv(descriptor, input.base + end, Self.inputCapacity - end, Int32(MSG_DONTWAIT))
            if count > 0 { end += count }
        }
        if count > 0 {
            if state == .shakingHands { finishHandshake() }
            if state == .ready { parse() }
        } else if count == 0 {
            ended(
                inFlight > 0 || state == .shakingHands || failures > 0
                    ? "the store closed the connection" : "the store closed the connection while it was idle")
        } else if errno != EAGAIN, errno != EINTR {
            ended("receive: \(errnoText(errno))")
        }
    }

    private func parse() {
        while state == .ready, let input {
            if let request = reading {
                let left = Int(request.pointee.length &- request.pointee.received)
                let here = min(left, end - start)
                (request.pointee.payload + Int(request.pointee.received)).copyMemory(
                    from: input.base + start, byteCount: here)
                start += here
                request.pointee.received &+= UInt32(here)
                guard request.pointee.received == request.pointee.length else { return }
                reading = nil
                finish(request, readingReply)
                continue
            }
            guard end - start >= StoreReply.size else { return }
            let reply = StoreReply(decoding: input.base + start)
            start += StoreReply.size
            guard Int(reply.id) < depth, let request = slots[Int(reply.id)],
                request.pointee.sequence == reply.sequence, request.pointee.isSent
            else {
                return fail("an answer to nothing that was asked (id \(reply.id), sequence \(reply.sequence))")
            }
            // The data of a read follows, and only when it succeeded.
            if !request.pointee.isWrite, reply.status == .success {
                reading = request
                readingReply = reply
                continue
            }
            finish(request, reply)
        }
    }

    private func finish(_ request: UnsafeMutablePointer<StoreRequest>, _ reply: StoreReply) {
        if failures > 0 { (failures, losses) = (0, 0) }
        if !isRetiring { restsUntil = 0 }
        hasAnswered = true
        release(reply.id)
        owner.answered(request, reply, by: self)
        if isRetiring { endIfRetired() }
    }

    @inline(__always)
    private func release(_ id: UInt16) {
        slots[Int(id)] = nil
        freeIDs[freeCount] = id
        freeCount &+= 1
    }

    // MARK: The end of a connection

    /// By the store, or on the way there.
    private func ended(_ reason: String) {
        guard state == .ready, !hasAnswered, start == end, reading == nil else { return fail(reason) }
        restsUntil = loop.now &+ Self.rest
        // A store that is killed does the same, once.
        hasNoRoom = wasTurnedAway
        fail(
            hasNoRoom
                ? "the store has no room for another connection"
                : "the store closed the connection before its first answer", turnedAway: true)
    }

    /// Closes it first; then everything that was under way on it goes back to the volume.
    /// - Parameter isItsOwn: nothing is wrong with another connection that is closed because of this one.
    func fail(_ reason: String, turnedAway: Bool = false, refused: Bool = false, isItsOwn: Bool = true) {
        lostRequests = inFlight > 0 || hasAbandoned
        lostWrites = hasAbandoned || sentOfFirst > 0 || hasInFlight { $0.isWrite && $0.isSent }
        lastFailure = reason
        wasTurnedAway = turnedAway
        wasRefused = refused
        if isItsOwn {
            failures += 1
            losses = turnedAway ? 0 : losses + 1
        }
        var orphans = withdraw()
        while let request = orphans.removeFirst() { owner.orphaned(request) }
        owner.connectionFailed(self, reason)
    }

    /// Closes it first; then gives back everything that was under way on it.
    func withdraw() -> StoreQueue {
        close()
        socketIsFull = false
        sentOfFirst = 0
        sending = StoreQueue()
        reading = nil
        var orphans = takeWaiting()
        for index in 0..<depth {
            guard let request = slots[index] else { continue }
            slots[index] = nil
            request.pointee.sequence &+= 1
            orphans.append(request)
        }
        depth = 0
        freeCount = 0
        return orphans
    }
}
