import EventLoop
import Logging
import PureFlash
import Synchronization
import ZooKeeper

/// Keeps this conductor registered in ZooKeeper, as PureFlash's own are: a node that goes with the session, and comes
/// again with the next.
final class ConductorRegistration: ZooKeeperDuty {
    private let client: ZooKeeperClient
    private let path: String
    private let address: String
    private let logger: Logger
    private let state = Mutex(State())

    private struct State {
        /// The node, and the session it belongs to.
        var node: (path: String, session: Int64)?
        var told = ""
    }

    /// - Parameters:
    ///   - servers: of ZooKeeper, each `host:port`.
    ///   - port: of the conductor. PureFlash's own clients know the usual one only, and no other is written.
    init(servers: [String], cluster: String, address: String, port: UInt16, logger: Logger) {
        client = ZooKeeperClient(servers: servers, connectTimeout: 8_000_000_000)
        path = ConductorDiscovery.path(cluster)
        self.address = Int(port) == ConductorClient.defaultPort ? address : "\(address):\(port)"
        self.logger = logger
    }

    func start() throws(SystemError) { try client.start(self) }

    /// Takes the node away, if ZooKeeper is there.
    func stop() async { await client.stop() }

    func attend(_ session: ZooKeeperSession) throws(ZooKeeperError) {
        while true {
            // Watched from here on.
            if let node = state.withLock({ $0.node }), node.session == session.id, try session.exists(node.path) {
                return tell(.notice, "registered in ZooKeeper as \(node.path), at \(address)")
            }
            try session.createPath(path)
            let made = try session.createEphemeral(path + "/conductor", address)
            state.withLock { $0.node = (made, session.id) }
        }
    }

    func disconnected() {
        tell(.warning, "the connection to ZooKeeper is lost; the registration goes when it does not come back in time")
    }

    func failed(_ error: ZooKeeperError) { tell(.warning, "not registered in ZooKeeper, tried again: \(error)") }

    private func tell(_ level: Logger.Level, _ text: String) {
        let isNew = state.withLock { state in
            defer { state.told = text }
            return state.told != text
        }
        if isNew { logger.log(level: level, "\(text)") }
    }
}
