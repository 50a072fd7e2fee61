import CLinux
import Glibc

/// Accepts the clients of a listening socket, on the loop's thread. Those that cannot be accepted for want of descriptors
/// or memory wait in the backlog, and are asked for again.
package final class Acceptor: EventSource {
    /// Clients accepted before others on the loop get their turn; those left in the backlog are told again.
    private static let maximumBatch = 64
    private static let retryMilliseconds: UInt64 = 100

    private let loop: EventLoop
    private let descriptor: Int32
    private let accepted: (Int32, String) -> Void
    private let failed: (String) -> Void
    private var token: EventLoop.Token?
    private var retry: LoopTimer?

    /// Takes over a listening socket that does not block; when this throws it is still the caller's.
    /// - Parameters:
    ///   - accepted: takes a client's socket, and who it is for the log: "unix" or an address with its port.
    ///   - failed: takes why a client could not be accepted.
    package init(
        loop: EventLoop, descriptor: Int32, accepted: @escaping (Int32, String) -> Void,
        failed: @escaping (String) -> Void
    ) throws(SystemError) {
        self.loop = loop
        self.descriptor = descriptor
        self.accepted = accepted
        self.failed = failed
        token = try loop.add(descriptor, events: EPOLLIN.rawValue, source: self)
        retry = LoopTimer(loop: loop) { [unowned self] in wait(for: EPOLLIN.rawValue) }
    }

    /// Stops listening.
    package func close() {
        retry?.cancel()
        guard let token else { return }
        loop.remove(token, descriptor: descriptor)
        self.token = nil
        Glibc.close(descriptor)
    }

    package func ready(events: UInt32) {
        for _ in 0..<Self.maximumBatch where token != nil {
            var address = sockaddr_storage()
            var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
            let client = withUnsafeMutablePointer(to: &address) { storage in
                storage.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    accept4(
                        descriptor, __SOCKADDR_ARG(__sockaddr__: $0), &length,
                        Int32(SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue))
                }
            }
            guard client >= 0 else { return acceptFailed(errno) }
            accepted(client, describe(&address, length))
        }
    }

    private func acceptFailed(_ code: Int32) {
        switch code {
        case EAGAIN, EINTR, ECONNABORTED: return
        default:
            // EMFILE, ENFILE, ENOMEM: asking again at once would spin.
            failed("cannot accept a client: \(errnoText(code)); trying again in \(Self.retryMilliseconds) ms")
            wait(for: 0)
            retry?.arm(after: Self.retryMilliseconds * 1_000_000)
        }
    }

    private func wait(for events: UInt32) {
        if let token { loop.modify(token, descriptor: descriptor, events: events) }
    }

    private func describe(_ address: inout sockaddr_storage, _ length: socklen_t) -> String {
        guard address.ss_family != AF_UNIX else { return "unix" }
        var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
        let code = withUnsafePointer(to: &address) { storage in
            storage.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                getnameinfo(
                    $0, length, &host, socklen_t(host.count), &port, socklen_t(port.count),
                    NI_NUMERICHOST | NI_NUMERICSERV)
            }
        }
        guard code == 0 else { return "tcp" }
        let text = [host, port].map { field in
            String(decoding: field.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        }
        return text.joined(separator: ":")
    }
}
