import Backend
import Configuration
import EventLoop
import Glibc
import Logging
import NIOCore
import NIOPosix
import PureFlash

/// A store, and the conductor of a cluster if it is to be one: their sockets and what stands behind them.
package final class StoreServer: Sendable {
    package struct Settings: Sendable {
        /// The IPv4 address it listens on, and under which clients know it.
        package var address: String
        /// Nil: another process is the conductor.
        package var conductorPort: UInt16?
        package var dataPort: UInt16
        /// Of a store's HTTP, the same at all stores of a cluster.
        package var storePort: UInt16
        /// Addresses that serve the shards of new volumes, in turn.
        package var stores: [String]
        /// Acknowledge writes when they are on stable storage.
        package var durable: Bool
        package var allowFaults: Bool
        package var pools: [PoolConfiguration]
        /// Where the conductor registers; nil for nowhere.
        package var zookeeper: DaemonConfiguration.ZooKeeper?

        package init(
            address: String, conductorPort: UInt16?, dataPort: UInt16, storePort: UInt16, stores: [String],
            durable: Bool, allowFaults: Bool, pools: [PoolConfiguration], zookeeper: DaemonConfiguration.ZooKeeper?
        ) {
            self.address = address
            self.conductorPort = conductorPort
            self.dataPort = dataPort
            self.storePort = storePort
            self.stores = stores
            self.durable = durable
            self.allowFaults = allowFaults
            self.pools = pools
            self.zookeeper = zookeeper
        }
    }

    private let node: StoreNode
    private let conductor: Conductor
    private let listener: DataListener
    private let services: [HTTPService]
    private let group: MultiThreadedEventLoopGroup
    private let registration: ConductorRegistration?

    /// Listens and answers when it returns.
    package init(_ settings: Settings, logger: Logger) async throws(BackendError) {
        let faults = settings.allowFaults ? Faults() : nil
        let pools = Dictionary(
            uniqueKeysWithValues: settings.pools.map { pool in
                (pool.name, StorePool(pool, own: settings.address) { logger.warning("\($0)") })
            })
        do throws(SystemError) {
            let node = StoreNode(
                address: settings.address, pools: pools, durable: settings.durable, faults: faults,
                logger: logger)
            self.node = node
            listener = try DataListener(
                host: settings.address, port: settings.dataPort, faults: faults, logger: logger,
                volume: { node.volume($0) })
            group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
            let conductor = Conductor(
                node: node, caller: StoreCaller(group: group, port: Int(settings.storePort)),
                pools: pools, stores: settings.stores, faults: faults, logger: logger)
            self.conductor = conductor
            try await listener.start()
            let control = FaultControl(faults: faults, node: node, conductor: conductor)
            var services: [HTTPService] = []
            services.append(
                try await Self.serve(group, settings.address, settings.storePort) { query in
                    if query.path == FaultControl.path, let answer = await control.answer(query) { return answer }
                    return await Self.answerAsStore(query, node)
                })
            if let port = settings.conductorPort {
                services.append(
                    try await Self.serve(group, settings.address, port) { query in
                        if query.path == FaultControl.path, let answer = await control.answer(query) { return answer }
                        if faults?.value(.silentConductor) ?? 0 > 0 { return nil }
                        return await conductor.answer(query)
                    })
            }
            self.services = services
            // Last: whoever finds it there finds it ready.
            if let zookeeper = settings.zookeeper, let port = settings.conductorPort {
                let registration = ConductorRegistration(
                    servers: zookeeper.ip, cluster: zookeeper.clusterName ?? ConductorDiscovery.defaultCluster,
                    address: settings.address, port: port, logger: logger)
                try registration.start()
                self.registration = registration
            } else {
                registration = nil
            }
        } catch { throw BackendError(error) }
    }

    private static func serve(
        _ group: MultiThreadedEventLoopGroup, _ host: String, _ port: UInt16,
        answer: @escaping @Sendable (HTTPQuery) async -> String?
    ) async throws(SystemError) -> HTTPService {
        do { return try await HTTPService(group: group, host: host, port: Int(port), answer: answer) } catch {
            let code = (error as? IOError)?.errnoCode ?? EIO
            throw SystemError(code: code, operation: "listen on \(host):\(port)")
        }
    }

    /// What a conductor says to a store.
    private static func answerAsStore(_ query: HTTPQuery, _ node: StoreNode) async -> String {
        do throws(RefusedRequest) {
            guard query.path == "/api" || query.path == "/api/" else {
                throw RefusedRequest(.failed, "a store is asked at /api?op=OPERATION")
            }
            if query.operation == "set_meta_ver", query.body.isEmpty {
                // As PureFlash's own conductor says it.
                guard let id = query.parameters["volume_id"].flatMap({ UInt64($0) }),
                    let version = query.parameters["meta_ver"].flatMap({ Int64($0) })
                else { throw RefusedRequest(.invalidArgument, "volume_id or meta_ver is missing, or is no number") }
                await node.setMetaVersion(UInt16(truncatingIfNeeded: version), of: id)
            } else {
                var order = try StoreJSON.decode(VolumeOrder.self, from: query.body)
                order.op = query.operation
                try await node.obey(order)
            }
            return StoreJSON.encode(PlainAnswer(op: query.operation + "_reply", retCode: 0, reason: ""))
        } catch {
            return StoreJSON.encode(
                PlainAnswer(op: query.operation + "_reply", retCode: error.code.rawValue, reason: error.reason))
        }
    }

    /// Ends connections, finishes what is in flight, and closes the volumes.
    package func stop() async {
        // First: nobody is to look for it here any more.
        await registration?.stop()
        for service in services { await service.stop() }
        await conductor.stop()
        await listener.stop()
        await node.stop()
        // Fails only when it was shut down before.
        try? await group.shutdownGracefully()
    }
}

/// `GET /faults?SWITCH=NUMBER&...`: turns switches and answers how all stand, and what was seen.
struct FaultControl: Sendable {
    static let path = "/faults"

    let faults: Faults?
    let node: StoreNode
    let conductor: Conductor

    /// - Returns: nil where there are no switches, so that the path is like any other.
    func answer(_ query: HTTPQuery) async -> String? {
        guard let faults else { return nil }
        do throws(RefusedRequest) {
            try await set(query, faults)
        } catch {
            return StoreJSON.encode(
                PlainAnswer(op: "faults_reply", retCode: error.code.rawValue, reason: error.reason))
        }
        node.faultsChanged()
        let switches = Faults.Switch.allCases.map { ($0.rawValue, faults.value($0)) }
        let counters = Faults.Counter.allCases.map { ($0.rawValue, faults.seen($0)) }
        return StoreJSON.encode(
            FaultsAnswer(
                faults: Dictionary(uniqueKeysWithValues: switches), seen: Dictionary(uniqueKeysWithValues: counters)))
    }

    private func set(_ query: HTTPQuery, _ faults: Faults) async throws(RefusedRequest) {
        for (name, text) in query.parameters {
            if name == "clear" {
                for each in Faults.Switch.allCases { faults.set(each, to: 0) }
                continue
            }
            if name == "stale" {
                let parts = text.split(separator: "/").map(String.init)
                guard parts.count == 2 else { throw RefusedRequest(.invalidArgument, "stale is tenant/volume") }
                try await conductor.makeStale(tenant: parts[0], volume: parts[1])
                continue
            }
            guard let found = Faults.Switch(rawValue: name), let value = UInt32(text) else {
                throw RefusedRequest(.invalidArgument, "no switch \(name)=\(text)")
            }
            faults.set(found, to: Int(value))
        }
    }
}
