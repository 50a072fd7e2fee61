import CLinux
import EventLoop
import Glibc
import Logging
import PureFlash

/// Accepts data connections and takes their handshakes, on a loop of its own. A connection that is not done within its
/// time is closed; when there are too many, the one that waits longest goes.
final class DataListener: @unchecked Sendable {
    private static let maximumHandshakes = 512
    /// Seconds from connecting to a whole handshake.
    static let handshakeTimeout: UInt64 = 10
    /// Milliseconds a client may be silent or take nothing; it connects again when it was not gone.
    private static let silence: Int32 = 30_000

    let loop: EventLoop
    private let descriptor: Int32
    private let volume: @Sendable (UInt64) -> StoreVolume?
    let faults: Faults?
    let logger: Logger
    private var acceptor: Acceptor?
    /// Oldest first.
    private var pending: [PendingHandshake] = []

    /// Listens; nobody is accepted before `start`.
    /// - Parameter volume: the prepared volume of an id; called on the listener's loop.
    init(
        host: String, port: UInt16, faults: Faults?, logger: Logger,
        volume: @escaping @Sendable (UInt64) -> StoreVolume?
    ) throws(SystemError) {
        descriptor = try ListeningSocket.tcp(host: host, port: port)
        do { loop = try EventLoop(name: "store:accept") } catch {
            Glibc.close(descriptor)
            throw error
        }
        self.volume = volume
        self.faults = faults
        self.logger = logger
    }

    func start() async throws(SystemError) {
        let failure = await loop.call { [self] () -> SystemError? in
            do throws(SystemError) {
                acceptor = try Acceptor(loop: loop, descriptor: descriptor) { [unowned self] client, peer in
                    begin(client, peer: peer)
                } failed: { [unowned self] in
                    logger.warning("\($0)")
                }
                return nil
            } catch { return error }
        }
        if let failure = failure ?? nil { throw failure }
    }

    func stop() async {
        _ = await loop.call { [self] in
            if let acceptor { acceptor.close() } else { Glibc.close(descriptor) }
            acceptor = nil
            for handshake in pending { handshake.close() }
            pending = []
        }
        loop.stop()
    }

    private func begin(_ client: Int32, peer: String) {
        // A client that has vanished keeps its volume from being deleted, and others from its place.
        ListeningSocket.watch(client, idle: 5, interval: 5, limit: Self.silence)
        if pending.count >= Self.maximumHandshakes { pending[0].end("too many connections without a handshake") }
        let handshake = PendingHandshake(descriptor: client, peer: peer, listener: self)
        do throws(SystemError) {
            try handshake.start()
            pending.append(handshake)
        } catch { logger.warning("\(peer): \(error)") }
    }

    fileprivate func ended(_ handshake: PendingHandshake) { pending.removeAll { $0 === handshake } }

    /// A whole handshake has come.
    fileprivate func finish(_ handshake: PendingHandshake, _ message: StoreHandshake) {
        faults?.count(.handshakes)
        var answer = message
        answer.result = StoreHandshake.refused
        let peer = handshake.peer
        let descriptor = handshake.detach()
        if !(1...StoreProtocol.maximumDepth).contains(Int(message.depth)) {
            answer.depth = Int16(StoreProtocol.maximumDepth)
            logger.warning("\(peer): handshake refused: a depth of \(message.depth)")
        } else if message.result != StoreProtocol.version {
            logger.warning("\(peer): handshake refused: version \(message.result) of the protocol")
        } else if faults?.value(.refuse) ?? 0 > 0 {
            logger.info("\(peer): fault: handshake refused")
        } else if volume(message.volumeID) != nil, faults?.spend(.closeFirst) == true {
            answer.result = 0
            logger.info("\(peer): fault: closed behind a good handshake")
        } else if let volume = volume(message.volumeID) {
            return volume.attach(descriptor: descriptor, peer: peer, handshake: message)
        } else {
            logger.info(
                "\(peer): handshake refused: no volume 0x\(String(message.volumeID, radix: 16)) was opened here")
        }
        if !StoreVolume.send(answer, to: descriptor) { logger.debug("\(peer): left before it was answered") }
        Glibc.close(descriptor)
    }
}

/// One client in its handshake, on the listener's loop.
private final class PendingHandshake: EventSource {
    let peer: String
    private let descriptor: Int32
    private unowned let listener: DataListener
    private var token: EventLoop.Token?
    private var deadline: LoopTimer?
    private var message = (UInt64(0), UInt64(0), UInt64(0), UInt64(0))
    private var received = 0

    init(descriptor: Int32, peer: String, listener: DataListener) {
        self.descriptor = descriptor
        self.peer = peer
        self.listener = listener
    }

    /// On an error the socket is closed.
    func start() throws(SystemError) {
        do { token = try listener.loop.add(descriptor, events: EPOLLIN.rawValue, source: self) } catch {
            Glibc.close(descriptor)
            throw error
        }
        let timer = LoopTimer(loop: listener.loop) { [unowned self] in
            end("no handshake within \(DataListener.handshakeTimeout) s")
        }
        timer.arm(after: DataListener.handshakeTimeout * 1_000_000_000)
        deadline = timer
    }

    /// Leaves the loop; the socket is the caller's.
    func detach() -> Int32 {
        deadline?.cancel()
        deadline = nil
        if let token { listener.loop.remove(token, descriptor: descriptor) }
        token = nil
        listener.ended(self)
        return descriptor
    }

    func close() { Glibc.close(detach()) }

    func end(_ reason: String?) {
        if let reason { listener.logger.info("\(peer): closed: \(reason)") }
        close()
    }

    func ready(events: UInt32) {
        let count = withUnsafeMutableBytes(of: &message) { bytes in
            recv(descriptor, bytes.baseAddress.map { $0 + received }, bytes.count - received, Int32(MSG_DONTWAIT))
        }
        if count > 0 {
            received += count
            guard received == StoreHandshake.size else { return }
            let decoded = withUnsafeBytes(of: &message) { bytes in
                bytes.baseAddress.map { StoreHandshake(decoding: $0) }
            }
            if let decoded { listener.finish(self, decoded) }
        } else if count == 0 {
            end(nil)
        } else if errno != EAGAIN && errno != EINTR {
            end("receive: \(errnoText(errno))")
        }
    }
}
