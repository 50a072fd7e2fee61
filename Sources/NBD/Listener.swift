import CLinux
import EventLoop
import Glibc

/// Finds exports and takes connections whose handshake is done. Called on the listener's loop.
package protocol ExportHost: ExportDirectory, AnyObject {
    /// Serves the connection from here on, and closes it in the end.
    /// - Parameter leftover: what the client sent behind the handshake.
    func attach(descriptor: Int32, peer: String, negotiated: Negotiated, leftover: [UInt8])
    /// How many clients are in their handshake now; told when one has begun it, and when one has left it, after `attach`
    /// where it comes to that.
    func handshakesChanged(_ count: Int)
    /// One line for the log.
    func listenerEvent(_ message: String)
}

/// A listening socket on a loop of its own: accepts, and leads each client through the handshake without waiting for
/// any. Used on its loop's thread alone; only the reference travels.
package final class Listener: @unchecked Sendable {
    /// Handshakes under way at a time. One more ends the oldest, so that clients that say nothing keep nobody out.
    static let maximumHandshakes = 512
    /// Seconds between two lines about handshakes that made room.
    private static let reportInterval = 10.0
    /// Seconds a client has for its handshake.
    static let handshakeTimeout: UInt64 = 30

    let loop: EventLoop
    unowned(unsafe) let host: any ExportHost
    private let isTCP: Bool
    private var acceptor: Acceptor?
    /// In the order of their arrival.
    private var handshakes: [HandshakeConnection] = []
    private var madeRoom = 0
    private var nextReport = Deadline(seconds: 0)

    /// Takes over a listening socket; on the loop's thread.
    /// - Parameter host: outlives the listener.
    package init(loop: EventLoop, descriptor: Int32, isTCP: Bool, host: any ExportHost) throws(SystemError) {
        self.loop = loop
        self.host = host
        self.isTCP = isTCP
        acceptor = try Acceptor(loop: loop, descriptor: descriptor) { [unowned self] client, peer in
            // Two minutes: a client that loses an idle connection may not make another one.
            if self.isTCP { ListeningSocket.watch(client, idle: 60, interval: 12) }
            begin(client, peer: peer)
        } failed: { [unowned self] in
            self.host.listenerEvent($0)
        }
    }

    /// Stops listening and drops clients that are still in their handshake; on the loop's thread.
    package func close() {
        acceptor?.close()
        acceptor = nil
        for connection in handshakes { connection.close() }
        handshakes = []
    }

    private func begin(_ client: Int32, peer: String) {
        let connection = HandshakeConnection(descriptor: client, peer: peer, listener: self)
        do {
            try connection.start()
        } catch {
            host.listenerEvent("\(peer): \(error)")
            return
        }
        handshakes.append(connection)
        host.handshakesChanged(handshakes.count)
        if handshakes.count > Self.maximumHandshakes { makeRoom() }
        connection.proceed()
    }

    private func makeRoom() {
        madeRoom += 1
        handshakes.removeFirst().close()
        guard nextReport.passed else { return }
        host.listenerEvent(
            "\(madeRoom) client\(madeRoom == 1 ? "" : "s") that had not finished the handshake made room for others:"
                + " \(Self.maximumHandshakes) are under way")
        madeRoom = 0
        nextReport = Deadline(seconds: Self.reportInterval)
    }

    func ended(_ connection: HandshakeConnection) {
        handshakes.removeAll { $0 === connection }
        host.handshakesChanged(handshakes.count)
    }
}

/// One client in its handshake, on the listener's loop.
final class HandshakeConnection: EventSource {
    private let descriptor: Int32
    private let peer: String
    private unowned let listener: Listener
    private var token: EventLoop.Token?
    private var deadline: LoopTimer?
    private var handshake = Handshake()
    private var input: [UInt8] = []
    private var sent = 0
    private var outcome: Handshake.Progress?
    private var waitsForRoom = false

    init(descriptor: Int32, peer: String, listener: Listener) {
        self.descriptor = descriptor
        self.peer = peer
        self.listener = listener
    }

    func start() throws(SystemError) {
        do {
            token = try listener.loop.add(descriptor, events: EPOLLIN.rawValue, source: self)
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        let timer = LoopTimer(loop: listener.loop) { [unowned self] in
            end("no handshake within \(Listener.handshakeTimeout) s")
        }
        timer.arm(after: Listener.handshakeTimeout * 1_000_000_000)
        deadline = timer
    }

    /// Leaves the loop and closes the socket.
    func close() {
        detach()
        Glibc.close(descriptor)
    }

    private func detach() {
        deadline?.cancel()
        deadline = nil
        if let token { listener.loop.remove(token, descriptor: descriptor) }
        token = nil
    }

    private func end(_ reason: String?) {
        guard token != nil else { return }
        close()
        if let reason { listener.host.listenerEvent("\(peer): handshake ended: \(reason)") }
        listener.ended(self)
    }

    func ready(events: UInt32) {
        if events & EPOLLOUT.rawValue != 0 { return proceed() }
        guard events & EPOLLIN.rawValue != 0 else { return end(nil) }
        let count = withUnsafeTemporaryAllocation(byteCount: 16384, alignment: 8) { buffer in
            let count = recv(descriptor, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
            if count > 0 { input.append(contentsOf: buffer.prefix(count)) }
            return count
        }
        if count > 0 { return proceed() }
        if count == 0 { return end(input.isEmpty ? nil : "the client closed within an option") }
        if errno != EAGAIN && errno != EINTR { end("receive: \(errnoText(errno))") }
    }

    /// Handles what has arrived and sends what there is to say, until one of both has to wait.
    func proceed() {
        // What was held up by unsent output is handled when that is out: the client may have said all it has to say.
        guard send() else { return }
        while token != nil {
            let before = input.count
            if outcome == nil {
                let progress = handshake.receive(&input, exports: AnyDirectory(host: listener.host))
                if progress != .needsMore { outcome = progress }
            }
            guard send() else { return }
            switch outcome {
            case nil, .needsMore: if input.isEmpty || input.count == before { return }
            case .closed(let reason): return end(reason)
            case .transmission(let negotiated):
                detach()
                listener.host.attach(descriptor: descriptor, peer: peer, negotiated: negotiated, leftover: input)
                listener.ended(self)
                return
            }
        }
    }

    /// - Returns: whether all output is out; otherwise the socket is waited for, and nothing is read meanwhile.
    private func send() -> Bool {
        while sent < handshake.output.count {
            let count = handshake.output.withUnsafeBytes { bytes in
                Glibc.send(
                    descriptor, bytes.baseAddress.map { $0 + sent }, bytes.count - sent,
                    Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
            }
            if count >= 0 {
                sent += count
            } else if errno == EAGAIN {
                setWaiting(true)
                return false
            } else if errno != EINTR {
                end("send: \(errnoText(errno))")
                return false
            }
        }
        handshake.output.removeAll(keepingCapacity: true)
        sent = 0
        setWaiting(false)
        return true
    }

    private func setWaiting(_ waiting: Bool) {
        guard waiting != waitsForRoom, let token else { return }
        waitsForRoom = waiting
        let events = waiting ? EPOLLOUT.rawValue : EPOLLIN.rawValue
        listener.loop.modify(token, descriptor: descriptor, events: events)
    }
}

/// Opens the existential once, for the generic handshake.
private struct AnyDirectory: ExportDirectory {
    unowned(unsafe) let host: any ExportHost
    func export(named name: String) -> ExportLookup { host.export(named: name) }
    func exportNames() -> [String] { host.exportNames() }
}
