import Backend
import Configuration
import Control
import Glibc
import LocalPool
import Logging
import PureFlash
import Volumes

/// Which pool a request means: a configuration's path and a pool's name lead to one object, as long as the daemon lives;
/// for a cluster's pool, as long as somebody uses it, because any name may be one.
///
/// A file is read each time it is named. A pool that it says the same of as before stays the same object, so what
/// is in a memory pool survives a change of the file.
actor PoolDirectory {
    private struct Key: Hashable {
        let config: String
        let pool: PoolConfiguration
    }

    private struct DiscoveryKey: Hashable {
        let zookeeper: DaemonConfiguration.ZooKeeper
        let timeout: Duration
    }

    private struct ClusterPool {
        weak var pool: PureFlashPool?
    }

    private let defaultPath: String?
    private let logger: Logger
    /// One thread waits for a path, however many name it.
    private let reads = NameQueues()
    /// What was said of each file, not to say it again.
    private var warned: [String: [String]] = [:]
    private var pools: [Key: any VolumePool] = [:]
    private var clusterPools: [Key: ClusterPool] = [:]
    /// Pools of one cluster, and of one file, share what they know of it.
    private var discoveries: [DiscoveryKey: ConductorDiscovery] = [:]

    /// - Parameter defaultPath: a configuration that may be missing, because nobody named it; it is empty then.
    init(defaultPath: String?, logger: Logger) {
        self.defaultPath = defaultPath
        self.logger = logger
    }

    /// What the file says now. A file system that does not answer holds up only those who name the same path.
    ///
    /// - Parameters:
    ///   - path: absolute.
    ///   - caller: who named it; nobody learns by the daemon's rights what a file says.
    /// - Throws: code 2 when it is missing, 1 when the caller may not read it, 22 with file and line when it is wrong.
    func configuration(_ path: String, for caller: ControlCaller) async throws(ControlError) -> DaemonConfiguration {
        let mayBeMissing = path == defaultPath
        let result: Result<DaemonConfiguration, ConfigurationError>
        do throws(BackendError) {
            result = try await reads.run(path) { () throws(BackendError) in
                try await Aside.run { () throws(BackendError) in
                    Self.load(path, mayBeMissing, caller)
                }
            }
        } catch {
            // There can be no thread for it.
            result = Self.load(path, mayBeMissing, caller)
        }
        do throws(ConfigurationError) {
            let configuration = try result.get()
            if warned[path] != configuration.warnings {
                for warning in configuration.warnings { logger.warning("\(warning)") }
                warned[path] = configuration.warnings
            }
            return configuration
        } catch {
            throw ControlError(error)
        }
    }

    private static func load(
        _ path: String, _ mayBeMissing: Bool, _ caller: ControlCaller
    ) -> Result<DaemonConfiguration, ConfigurationError> {
        Result { () throws(ConfigurationError) in
            do throws(ConfigurationError) {
                return try DaemonConfiguration.load(path: path, mayRead: caller.mayRead)
            } catch {
                guard mayBeMissing, error.systemError == ENOENT else { throw error }
                return try DaemonConfiguration(parsing: "", file: path)
            }
        }
    }

    /// The pool of this name in the configuration at this path.
    ///
    /// - Parameter transport: what the volume's name asks for, which goes before the configuration.
    /// - Throws: as `configuration`; code 2 when the file has no such pool.
    func pool(
        _ name: String, _ path: String, transport: Transport? = nil, for caller: ControlCaller
    ) async throws(ControlError) -> any VolumePool {
        try pool(name, of: try await configuration(path, for: caller), path, transport: transport)
    }

    /// The pool of this name in a configuration that was read at this path.
    func pool(
        _ name: String, of configuration: DaemonConfiguration, _ path: String, transport: Transport? = nil
    ) throws(ControlError) -> any VolumePool {
        do throws(ConfigurationError) {
            try VolumeName.validate(component: name, as: "pool name")
        } catch {
            throw ControlError(error)
        }
        let described: PoolConfiguration
        do throws(ConfigurationError) { described = try configuration.pool(named: name) } catch {
            throw ControlError(ENOENT, "\(error)")
        }
        if case .pureFlash(_, _, let client) = described.kind, (transport ?? client.connType) == .rdma {
            throw Feature.rdma.comesLater
        }
        let key = Key(config: path, pool: described)
        if let pool = pools[key] ?? clusterPools[key]?.pool { return pool }
        switch described.kind {
        case .local(let folder):
            return remember(
                LocalPool(name: name, path: folder) { [logger] line in logger.warning("\(line)") }, key)
        case .memory: return remember(MemoryPool(name: name), key)
        case .pureFlash(let zookeeper, let conductor, let client):
            let pool = PureFlashPool(
                name: name, conductor: self.conductor(zookeeper, conductor, client),
                settings: PureFlashSettings(client),
                logger: logger)
            clusterPools = clusterPools.filter { $0.value.pool != nil }
            clusterPools[key] = ClusterPool(pool: pool)
            return pool
        }
    }

    /// Who knows the tenants of the cluster that a configuration names; nil when it names none.
    func conductor(of configuration: DaemonConfiguration) -> ConductorClient? {
        guard configuration.hasCluster else { return nil }
        return conductor(configuration.zookeeper, configuration.conductor, configuration.client)
    }

    private func remember(_ pool: any VolumePool, _ key: Key) -> any VolumePool {
        pools[key] = pool
        return pool
    }

    private func conductor(
        _ zookeeper: DaemonConfiguration.ZooKeeper, _ conductor: DaemonConfiguration.Conductor,
        _ client: DaemonConfiguration.Client
    ) -> ConductorClient {
        let timeout = client.connTimeout
        guard conductor.endpoints.isEmpty else {
            return ConductorClient(
                .endpoints(conductor.endpoints.map { .init($0) }), timeout: timeout.nanoseconds)
        }
        let key = DiscoveryKey(zookeeper: zookeeper, timeout: timeout)
        let discovery =
            discoveries[key]
            ?? ConductorDiscovery(
                servers: zookeeper.ip, cluster: zookeeper.clusterName ?? ConductorDiscovery.defaultCluster,
                connectTimeout: UInt64(timeout.nanoseconds), logger: logger)
        discoveries[key] = discovery
        return ConductorClient(.zooKeeper(discovery), timeout: timeout.nanoseconds)
    }
}

extension VolumeTiming {
    init(_ client: DaemonConfiguration.Client) {
        self.init(slowIO: UInt64(client.slowIO), open: UInt64(client.openVolumeTimeout.components.seconds))
    }
}

extension HTTPEndpoint {
    /// - Parameter address: as the configuration has checked it: a port stands behind the last colon.
    fileprivate init(_ address: String) {
        let colon = address.lastIndex(of: ":") ?? address.endIndex
        self.init(
            host: address[..<colon].filter { $0 != "[" && $0 != "]" },
            port: Int(address[colon...].dropFirst()) ?? ConductorClient.defaultPort)
    }
}

extension PureFlashSettings {
    init(_ client: DaemonConfiguration.Client) {
        self.init(
            noDelay: client.tcpNoDelay, port: UInt16(client.storePort), depth: client.ioDepth,
            ioTimeout: UInt64(client.ioTimeout.nanoseconds),
            connectTimeout: UInt64(client.connTimeout.nanoseconds),
            connectionsPerStore: client.connectionsPerStore,
            httpPort: client.storeHTTPPort.map(UInt16.init),
            grace: UInt64(client.storeGrace.nanoseconds))
    }
}

extension Duration {
    fileprivate var nanoseconds: Int64 { components.seconds * 1_000_000_000 + components.attoseconds / 1_000_000_000 }
}

extension DeviceSettings {
    init(_ nbd: DaemonConfiguration.NBD) {
        self.init(connections: nbd.connections, reattachTimeout: UInt64(nbd.reattachTimeout.components.seconds))
    }
}
