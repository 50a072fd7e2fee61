import CZooKeeper
import EventLoop
import Glibc
import Synchronization

/// What is done with the help of ZooKeeper. All calls come on the client's thread.
package protocol ZooKeeperDuty: AnyObject, Sendable {
    /// There is a connection, of this session or of a new one, or what was watched in it may have changed. After an error
    /// it is called again within a second.
    func attend(_ session: ZooKeeperSession) throws(ZooKeeperError)
    /// The connection is lost; a new one is being made.
    func disconnected()
    /// There was no connection in time, and there is still none, or `attend` has failed.
    func failed(_ error: ZooKeeperError)
}

/// Keeps a session with a ZooKeeper ensemble, and begins a new one when it has expired. Has a thread of its own, since
/// everything here may wait for a server or a name.
package final class ZooKeeperClient: Sendable {
    /// Nanoseconds before what failed is done again.
    private static let pause: UInt64 = 1_000_000_000

    private let servers: String
    private let sessionTimeout: Int32
    private let connectTimeout: UInt64
    private let events = ZooKeeperEvents()
    private let ended = Mutex<Ended>(Ended())

    private struct Ended {
        var stopping = false
        var done = false
        var waiting: [CheckedContinuation<Void, Never>] = []
    }

    /// - Parameters:
    ///   - servers: each `host:port`.
    ///   - sessionTimeout: milliseconds.
    ///   - connectTimeout: nanoseconds after which `failed` is called for want of a connection; connecting goes on.
    package init(servers: [String], sessionTimeout: Int32 = 10_000, connectTimeout: UInt64) {
        self.servers = servers.joined(separator: ",")
        self.sessionTimeout = sessionTimeout
        self.connectTimeout = connectTimeout
    }

    /// Begins. Call once.
    package func start(_ duty: any ZooKeeperDuty) throws(SystemError) {
        try Thread(name: "qbd:zookeeper") { [self] in run(duty) }.detach()
    }

    /// Closes the session, which takes its ephemeral nodes away, and ends the thread; returns when that is done.
    package func stop() async {
        ended.withLock { $0.stopping = true }
        events.happened()
        await withCheckedContinuation { continuation in
            let done = ended.withLock { ended in
                if !ended.done { ended.waiting.append(continuation) }
                return ended.done
            }
            if done { continuation.resume() }
        }
    }

    private func run(_ duty: any ZooKeeperDuty) {
        var session: ZooKeeperSession?
        var isAttended = false
        // Since there is no connection; nil when it was told that there is none.
        var missingSince: UInt64? = monotonicNanoseconds()
        while !ended.withLock({ $0.stopping }) {
            guard let current = session ?? begin(duty) else { continue }
            session = current
            switch current.state {
            case .over:
                current.close()
                session = nil
                if isAttended { duty.disconnected() }
                isAttended = false
            case .connected:
                missingSince = monotonicNanoseconds()
                isAttended = true
                do throws(ZooKeeperError) {
                    try duty.attend(current)
                    events.wait(nil)
                } catch {
                    // Without a connection, that is what is waited for.
                    if current.state == .connected { duty.failed(error) }
                    events.wait(Self.pause)
                }
            case .connecting:
                if isAttended {
                    isAttended = false
                    missingSince = monotonicNanoseconds()
                    duty.disconnected()
                }
                guard let since = missingSince else {
                    events.wait(nil)
                    continue
                }
                let passed = monotonicNanoseconds() - since
                if passed < connectTimeout {
                    events.wait(connectTimeout - passed)
                } else {
                    missingSince = nil
                    duty.failed(
                        ZooKeeperError(
                            ZOPERATIONTIMEOUT,
                            message: "no server answered within \(connectTimeout / 1_000_000_000) s"))
                }
            }
        }
        session?.close()
        for continuation in ended.withLock({ ended in
            ended.done = true
            return ended.waiting
        }) { continuation.resume() }
    }

    private func begin(_ duty: any ZooKeeperDuty) -> ZooKeeperSession? {
        do throws(ZooKeeperError) {
            return try ZooKeeperSession(servers: servers, timeout: sessionTimeout, events: events)
        } catch {
            duty.failed(error)
            events.wait(Self.pause)
            return nil
        }
    }
}

/// Wakes a client when something happened.
final class ZooKeeperEvents: Sendable {
    private let pending = Mutex(false)
    private let wake = Semaphore()

    /// From any thread.
    func happened() {
        let isFirst = pending.withLock { pending in
            defer { pending = true }
            return !pending
        }
        if isFirst { wake.signal() }
    }

    /// Returns at the first event since the last call, or after so many nanoseconds; nil is no limit.
    func wait(_ limit: UInt64?) {
        if let limit { guard wake.wait(nanoseconds: limit) else { return } } else { wake.wait() }
        pending.withLock { $0 = false }
    }
}
