import Backend
import EventLoop
import Glibc
import NIOCore
import Synchronization

/// Knows which stores of a cluster can be told to prepare a volume. From any thread.
///
/// A conductor that opens a volume, or makes a snapshot, tells every store that it believes alive. When a store cannot be
/// told, the conductor marks its replicas as failed, and they stay failed when the store is back. It believes a dead store
/// alive until the store's ZooKeeper session has ended (seen: 4 to 6 s). So a conductor is asked only when the stores answer
/// on the port where it would tell them, or when they have been silent for longer than a session.
final class StoreWatch: Sendable {
    /// Nanoseconds that a store has for an answer that costs it nothing.
    private static let patience: UInt64 = 1_000_000_000

    private struct Store {
        /// Monotonic nanoseconds since which it has not answered; nil while it does.
        var silentSince: UInt64?
        var looking: EventLoopFuture<Bool>?
    }

    /// Of a store's HTTP; nil when it is not known, and nothing can be said then.
    private let port: UInt16?
    /// Nanoseconds that a conductor may believe in a store that has died.
    private let grace: UInt64
    private let stores = Mutex<[String: Store]>([:])

    init(port: UInt16?, grace: UInt64) {
        self.port = port
        self.grace = grace
    }

    /// Whether it can be found out what stores do.
    var canLook: Bool { port != nil }

    /// Looks at all of them at the same time.
    /// - Parameters:
    ///   - addresses: IP addresses of stores.
    ///   - lost: monotonic nanoseconds since which one is known not to answer, as far as that is known.
    /// - Returns: those that do not answer, and may not have been missed by the conductor yet.
    func doubtful(
        _ addresses: Set<String>, since lost: [String: UInt64] = [:], on loop: any NIOCore.EventLoop
    ) -> EventLoopFuture<[String]> {
        look(at: addresses, on: loop).map { [self] answers in
            addresses.sorted().filter { isDoubtful($0, answers: answers.contains($0), since: lost[$0]) }
        }
    }

    /// Those that do not answer, however long.
    func silent(_ addresses: Set<String>, on loop: any NIOCore.EventLoop) -> EventLoopFuture<[String]> {
        look(at: addresses, on: loop).map { addresses.subtracting($0).sorted() }
    }

    /// - Returns: those that answer.
    private func look(at addresses: Set<String>, on loop: any NIOCore.EventLoop) -> EventLoopFuture<Set<String>> {
        let looks = addresses.map { address in look(at: address, on: loop).map { $0 ? address : nil } }
        return EventLoopFuture.whenAllSucceed(looks, on: loop).map { Set($0.compactMap(\.self)) }
    }

    private func isDoubtful(_ address: String, answers: Bool, since lost: UInt64?) -> Bool {
        stores.withLock { stores in
            guard !answers else {
                stores[address]?.silentSince = nil
                return false
            }
            let now = monotonicNanoseconds()
            let since = min(stores[address]?.silentSince ?? now, lost ?? now)
            stores[address, default: Store()].silentSince = since
            return now &- since < grace
        }
    }

    /// Whether the store answers an HTTP request, with any status. Callers at the same time share one request.
    private func look(at address: String, on loop: any NIOCore.EventLoop) -> EventLoopFuture<Bool> {
        guard let port else { return loop.makeSucceededFuture(true) }
        let promise = loop.makePromise(of: HTTPExchange.Answer.self)
        let found = promise.futureResult.map { _ in true }.recover { _ in false }
        let other = stores.withLock { stores -> EventLoopFuture<Bool>? in
            if let looking = stores[address]?.looking { return looking }
            stores[address, default: Store()].looking = found
            return nil
        }
        if let other {
            promise.fail(ChannelError.alreadyClosed)
            return other
        }
        let patience = TimeAmount.nanoseconds(Int64(Self.patience))
        let deadline = loop.scheduleTask(in: patience) { promise.fail(ChannelError.connectTimeout(patience)) }
        HTTPExchange.get(
            "/", from: HTTPEndpoint(host: address, port: Int(port)), peer: "the store \(address)", timeout: patience,
            promise: promise, on: loop
        ) { $0 }
        return found.map { [self] answers in
            deadline.cancel()
            stores.withLock { $0[address]?.looking = nil }
            return answers
        }
    }

    /// For an error's text.
    static func doubt(_ stores: [String]) -> String {
        let names = stores.prefix(4).joined(separator: ", ") + (stores.count > 4 ? ", ..." : "")
        return stores.count == 1 ? "the store \(names) does not answer" : "the stores \(names) do not answer"
    }
}
