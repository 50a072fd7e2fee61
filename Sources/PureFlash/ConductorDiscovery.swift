import Backend
import EventLoop
import Glibc
import Logging
import Synchronization
import ZooKeeper

/// Knows the conductor that leads a cluster, from ZooKeeper: the first of those that have registered there. Watches for
/// another one, and keeps to the last that was known while ZooKeeper is away.
package final class ConductorDiscovery: Sendable {
    /// What PureFlash's own programs call a cluster that nobody has named.
    package static let defaultCluster = "cluster1"

    /// Where the conductors of a cluster register.
    package static func path(_ cluster: String) -> String { "/pureflash/\(cluster)/conductors" }

    private enum Knowledge {
        /// Not asked yet, or there was no answer yet.
        case none
        case leader(HTTPEndpoint)
        case failure(BackendError)
    }

    package typealias Leader = Result<HTTPEndpoint, BackendError>

    private struct State {
        var started = false
        var knowledge = Knowledge.none
        /// The last leader, while what ZooKeeper says now is not known.
        var last: HTTPEndpoint?
        var told = ""
        var waiting: [@Sendable (Leader) -> Void] = []
    }

    private let servers: String
    private let cluster: String
    private let client: ZooKeeperClient
    private let logger: Logger
    private let state = Mutex(State())

    /// Asks nothing before the first question.
    /// - Parameters:
    ///   - servers: of ZooKeeper, each `host:port`.
    ///   - connectTimeout: nanoseconds.
    package init(servers: [String], cluster: String, connectTimeout: UInt64, logger: Logger) {
        self.servers = servers.joined(separator: ", ")
        self.cluster = cluster
        client = ZooKeeperClient(servers: servers, connectTimeout: connectTimeout)
        self.logger = logger
    }

    /// For an error's text.
    var name: String { "ZooKeeper at \(servers)" }

    /// For an error's text, behind the leader's address.
    var remedy: String { "look whether it runs: ZooKeeper at \(servers) has it as the conductor of \(cluster)" }

    /// The last leader that was known.
    var last: HTTPEndpoint? { state.withLock { $0.last } }

    /// Calls back at once with what is known, or else, on another thread, when something is.
    func leader(_ completion: @escaping @Sendable (Leader) -> Void) {
        let known = state.withLock { state -> Leader? in
            switch state.knowledge {
            case .leader(let endpoint): return .success(endpoint)
            case .failure(let error): return .failure(error)
            case .none:
                if let last = state.last { return .success(last) }
                state.waiting.append(completion)
                return nil
            }
        }
        if let known { return completion(known) }
        let isFirst = state.withLock { state in
            defer { state.started = true }
            return !state.started
        }
        guard isFirst else { return }
        do throws(SystemError) { try client.start(self) } catch {
            state.withLock { $0.started = false }
            settle(.failure(BackendError(error)))
            state.withLock { $0.knowledge = .none }
        }
    }

    private func settle(_ knowledge: Knowledge) {
        let waiting = state.withLock { state in
            state.knowledge = knowledge
            defer { state.waiting = [] }
            return state.waiting
        }
        for completion in waiting {
            switch knowledge {
            case .leader(let endpoint): completion(.success(endpoint))
            case .failure(let error): completion(.failure(error))
            case .none: break
            }
        }
    }

    /// Says each thing once until something else is said.
    private func tell(_ level: Logger.Level, _ text: String) {
        let isNew = state.withLock { state in
            defer { state.told = text }
            return state.told != text
        }
        if isNew { logger.log(level: level, "\(text)") }
    }

    private func refuse(_ code: Int32, _ message: String) {
        let message = "\(name) \(message)"
        tell(.warning, message)
        settle(.failure(BackendError(code: code, message: message)))
    }

    /// An IP address, as PureFlash's conductor writes it, and a port where it is not the usual one.
    package static func endpoint(_ bytes: [UInt8]) -> HTTPEndpoint? {
        guard let text = String(validating: bytes, as: UTF8.self) else { return nil }
        if StoreAddress(text) != nil { return .init(host: text, port: ConductorClient.defaultPort) }
        guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[colon...].dropFirst()), port > 0 else {
            return nil
        }
        var host = String(text[..<colon])
        if host.hasPrefix("["), host.hasSuffix("]") { host = String(host.dropFirst().dropLast()) }
        return StoreAddress(host) == nil ? nil : .init(host: host, port: Int(port))
    }
}

extension ConductorDiscovery: ZooKeeperDuty {
    package func attend(_ session: ZooKeeperSession) throws(ZooKeeperError) {
        let path = Self.path(cluster)
        while true {
            guard try session.exists(path) else {
                return refuse(
                    ENOENT,
                    "knows no cluster '\(cluster)': there is no \(path); look at [zookeeper] cluster_name, and whether a"
                        + " conductor has ever run")
            }
            let first = try session.children(of: path).min { $0.utf8.lexicographicallyPrecedes($1.utf8) }
            guard let first else {
                return refuse(
                    EHOSTUNREACH, "has no conductor of cluster '\(cluster)' now; look whether one runs")
            }
            let bytes: [UInt8]
            do throws(ZooKeeperError) { bytes = try session.data(of: "\(path)/\(first)") } catch {
                // It went in between.
                guard error.isMissingNode else { throw error }
                continue
            }
            guard let leader = Self.endpoint(bytes) else {
                let text = String(decoding: bytes.prefix(64), as: UTF8.self).filter { !$0.isNewline }
                return refuse(
                    EPROTO, "has '\(text)' in \(path)/\(first), where the IP address of a conductor should be")
            }
            state.withLock { $0.last = leader }
            tell(.notice, "the conductor of cluster '\(cluster)' is \(leader)")
            return settle(.leader(leader))
        }
    }

    package func disconnected() {
        tell(.warning, "the connection to ZooKeeper at \(servers) is lost; the conductor that is known is kept to")
        state.withLock { $0.knowledge = .none }
    }

    package func failed(_ error: ZooKeeperError) {
        let message = "cannot be reached: \(error); look whether it runs, and at [zookeeper] ip"
        guard state.withLock({ $0.last }) == nil else { return tell(.warning, "\(name) \(message)") }
        refuse(EHOSTUNREACH, message)
    }
}
