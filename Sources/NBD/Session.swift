import CLinux
import EventLoop
import Glibc

/// The volume, as its sessions see it. All calls on the volume's loop.
package protocol SessionTarget: AnyObject {
    /// A slot for a request; nil when there is none, and the session stops reading until its own are answered.
    func takeRequest() -> UnsafeMutablePointer<Request>?
    /// Where a large payload may be received straight away, inside the volume's checked bounds; nil for a buffer.
    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer?
    /// Some of that payload has arrived there.
    func payloadArrived(offset: UInt64, length: UInt32)
    /// Starts the request; it is answered once, by its `reply()`, maybe before this returns.
    func submit(_ request: UnsafeMutablePointer<Request>)
    /// The reply is out, or nobody is left to take it: the slot and what it holds are free.
    func release(_ request: UnsafeMutablePointer<Request>)
    /// The request was dropped before it was begun: its slot is free.
    func forget(_ request: UnsafeMutablePointer<Request>)
    /// Bytes have arrived on a connection; what is whole of them is parsed when this returns, unless it ended the session.
    func received(_ session: Session)
    /// The client sends no more, but may still take answers. What it sent may not all be parsed yet.
    func clientHungUp(_ session: Session)
    /// The connection is closed, and gets no more answers. What is in flight of it goes on; what was not begun need not
    /// be.
    func sessionClosed(_ session: Session)
    /// The connection has ended and nothing of it is in flight.
    /// - Parameter reason: for the log; nil when the client left as the protocol says.
    func sessionEnded(_ session: Session, reason: String?)
}

/// One client in the transmission phase, on the loop of its volume.
package final class Session: EventSource {
    /// Most requests from first byte to reply; the kernel's client sends up to 128 on a socket.
    package static let maximumInFlight = 128
    /// Payload and read data a session may hold at a time, unless one request alone is larger.
    static let maximumHeldBytes = 16 << 20
    /// Bytes of replies that wait in a Unix socket. With the usual 208 KiB a client that takes large ones runs dry before
    /// there are more: the kernel says that there is room when three quarters of it are empty.
    private static let sendBuffer: Int32 = 512 << 10
    /// Nanoseconds: who did not ask for so long waited for the reply before.
    static let sleep: UInt64 = 10_000

    /// For the log: "unix" or the peer's address.
    package let peer: String
    package private(set) var limits: RequestLimits
    let loop: EventLoop
    package let descriptor: Int32
    unowned(unsafe) let target: any SessionTarget
    let vectors: UnsafeMutablePointer<iovec>

    var token: EventLoop.Token?
    var events: UInt32 = 0
    var input: StreamInput
    /// Of the write whose payload is received at its place.
    var placedHeader: RequestHeader?
    /// Its header came alone, after a wait: the client had nothing else under way, and sleeps when it has sent the payload.
    var beganInWait = false
    /// Payload of a refused write, still to be thrown away, and how to answer it then.
    var dropping = 0
    var dropped: (header: RequestHeader, refusal: Refusal)?

    /// Requests from parsing to `release`.
    package private(set) var inFlight = 0
    var heldBytes = 0
    /// What the last recv(2) returned that was waited in, until it is handled.
    var received: Int?
    /// Parsing stopped for want of slots or bytes.
    var paused = false
    /// No more requests will come: DISC, end of stream, or the daemon stops.
    var draining = false
    /// The volume has been told that the client sends no more.
    private var hungUp = false
    package private(set) var closed = false
    private var ended = false
    var endReason: String?

    var firstReply: UnsafeMutablePointer<Request>?
    var lastReply: UnsafeMutablePointer<Request>?
    /// Bytes of the first reply that are already sent.
    var sentOfFirst = 0
    var waitsForRoom = false
    /// The magic number of a reply that is already sent, of a request that is not answered yet. Until it is, no reply is
    /// sent.
    var begun: UInt32?
    /// Let replies collect while the client has some to go on with; where the kernel tells that of the socket.
    package var mayRest: Bool
    /// The client is on this host.
    let isLocal: Bool
    /// As many unread bytes are some replies that the client has still to handle.
    var unreadWhenBusy = 0

    /// On the loop's thread.
    /// - Parameters:
    ///   - descriptor: a connected stream socket, owned by the session from here on.
    ///   - leftover: what the client sent behind the handshake.
    ///   - vectors: scratch of `vectorCapacity` iovecs, shared by the sessions of a loop.
    ///   - target: outlives the session.
    package init(
        descriptor: Int32, peer: String, negotiated: Negotiated, loop: EventLoop, buffers: BufferPool,
        vectors: UnsafeMutablePointer<iovec>, target: any SessionTarget
    ) {
        self.descriptor = descriptor
        self.peer = peer
        limits = RequestLimits(negotiated)
        self.loop = loop
        input = StreamInput(descriptor: descriptor, headerSize: RequestHeader.size, buffers: buffers)
        self.vectors = vectors
        self.target = target
        var domain: Int32 = 0
        var size = socklen_t(MemoryLayout<Int32>.size)
        // splice(2) has no flag for it.
        let flags = fcntl(descriptor, F_GETFL)
        if flags >= 0, flags & O_NONBLOCK == 0 { _ = fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) }
        isLocal = getsockopt(descriptor, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX
        mayRest = isLocal
        if isLocal { SendBuffer.enlarge(descriptor, to: Self.sendBuffer) }
    }

    /// Begins to serve. Throws what the loop says of the descriptor, and then has closed it.
    package func start(leftover: [UInt8]) throws(SystemError) {
        do {
            events = EPOLLIN.rawValue | EPOLLRDHUP.rawValue
            token = try loop.add(descriptor, events: events, source: self)
        } catch {
            Glibc.close(descriptor)
            closed = true
            throw error
        }
        guard !leftover.isEmpty else { return }
        guard input.begin(with: leftover) else { return fail("out of memory") }
        parse()
    }

    /// Reads no more requests; ends when those in flight are answered.
    package func drain() {
        draining = true
        updateEvents()
        endIfDone()
    }

    /// Takes in what the client sent before it hung up, as far as there is room for it; the rest never begins.
    package func finish() {
        while !draining, !paused { receive() }
        if !draining { drain() }
    }

    /// The export has grown, and this client is told so in its own way.
    package func resized(to size: UInt64) { limits.size = size }

    /// Ends at once; what is in flight completes without an answer.
    package func abort(_ reason: String) { fail(reason) }

    // MARK: Events

    package func ready(events ready: UInt32) {
        if ready & EPOLLOUT.rawValue != 0 {
            waitsForRoom = false
            updateEvents()
        }
        if ready & EPOLLRDHUP.rawValue != 0, !hungUp { hangUp() }
        if ready & EPOLLIN.rawValue != 0, !draining, !paused { return receive() }
        if ready & (EPOLLERR.rawValue | EPOLLHUP.rawValue) != 0 {
            // Nobody is there any more to read replies.
            fail(draining ? nil : "connection lost")
        } else if ready & EPOLLIN.rawValue != 0 {
            updateEvents()
        }
    }

    /// The client sends no more.
    func hangUp() {
        hungUp = true
        target.clientHungUp(self)
        updateEvents()
    }

    /// Waits for what is of use now: input when there is room for requests, output when the socket was full.
    func updateEvents() {
        guard let token, !closed else { return }
        var wanted: UInt32 = 0
        if !draining, !paused { wanted |= EPOLLIN.rawValue }
        if !draining, !hungUp { wanted |= EPOLLRDHUP.rawValue }
        if waitsForRoom { wanted |= EPOLLOUT.rawValue }
        guard wanted != events else { return }
        events = wanted
        loop.modify(token, descriptor: descriptor, events: wanted)
    }

    /// Called by the volume at the end of a turn.
    @inline(__always)
    package func endOfTurn() {
        if begun == nil, firstReply != nil, !waitsForRoom {
            sendReplies()
            if firstReply == nil {
                if loop.isBusy, clientIsBusy { loop.rest() }
                expectInput()
            }
        }
        if paused { resume() }
        if draining || closed { endIfDone() }
    }

    /// Called by the volume when the loop was quiet for a while: gives the memory of an idle connection back.
    package func releaseIdleMemory() { input.releaseIdleMemory() }

    // MARK: Slots

    @inline(__always)
    func take(_ header: RequestHeader, _ command: Command) -> UnsafeMutablePointer<Request>? {
        guard inFlight < Self.maximumInFlight, let request = target.takeRequest() else { return nil }
        inFlight &+= 1
        request.initialize(
            to: Request(session: .passUnretained(self), header: header, command: command, arrival: loop.now))
        return request
    }

    @inline(__always)
    func release(_ request: UnsafeMutablePointer<Request>) {
        giveBack(request)
        target.release(request)
    }

    /// Ends a request that was never started without an answer.
    func drop(_ request: UnsafeMutablePointer<Request>) {
        giveBack(request)
        target.forget(request)
    }

    /// What the request held of the session.
    @inline(__always)
    private func giveBack(_ request: UnsafeMutablePointer<Request>) {
        inFlight &-= 1
        if request.pointee.command == .read || request.pointee.command == .write {
            heldBytes &-= Int(request.pointee.length)
        }
        if let payload = request.pointee.input { input.release(payload) }
    }

    // MARK: The end

    /// Ends the connection now. Requests in flight go on without it.
    func fail(_ reason: String?) {
        guard !closed else { return }
        closed = true
        draining = true
        endReason = reason
        if let token { loop.remove(token, descriptor: descriptor) }
        token = nil
        Glibc.close(descriptor)
        while let request = firstReply {
            firstReply = request.pointee.next
            release(request)
        }
        lastReply = nil
        target.sessionClosed(self)
        loop.runAgain()
    }

    private func endIfDone() {
        guard draining, inFlight == 0, !ended else { return }
        if !closed { fail(endReason) }
        ended = true
        input.free()
        target.sessionEnded(self, reason: endReason)
    }
}
