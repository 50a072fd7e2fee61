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
/// A file is read again when it has changed. A pool that it says the same of as before stays the same object, so what
/// is in a memory pool survives a change of the file.
actor PoolDirectory {
    private struct File {
        let version: FileVersion
        let configuration: DaemonConfiguration
    }

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
    private var files: [String: File] = [:]
    private var pools: [Key: any VolumePool] = [:]
    private var clusterPools: [Key: ClusterPool] = [:]
    /// Pools of one cluster, and of one file, share what they know of it.
    private var discoveries: [DiscoveryKey: ConductorDiscovery] = [:]

    /// - Parameter defaultPath: a configuration that may be missing, because nobody named it; it is empty then.
    init(defaultPath: String?, logger: Logger) {
        self.defaultPath = defaultPath
        self.logger = logger
    }

    /// What the file says now.
    ///
    /// - Parameter path: absolute.
    /// - Throws: code 2 when it is missing, 22 with file and line when it is wrong.
    func configuration(_ path: String) throws(ControlError) -> DaemonConfiguration {
        // Looked at before it is read: should it change in between, it is read once too often, not too seldom.
        let version = FileVersion(path)
        if let version, let file = files[path], file.version == version { return file.configuration }
        do throws(ConfigurationError) {
            let configuration = try load(path, isMissing: version == nil)
            for warning in configuration.warnings { logger.warning("\(warning)") }
            files[path] = version.map { File(version: $0, configuration: configuration) }
            return configuration
        } catch {
            files[path] = nil
            throw ControlError(error)
        }
    }

    /// How long things may take by the configuration at this path.
    func timing(_ path: String) throws(ControlError) -> VolumeTiming { VolumeTiming(try configuration(path).client) }

    /// The NBD server's section of the configuration at this path, in the manager's terms of errors.
    func nbd(_ path: String) throws(BackendError) -> DaemonConfiguration.NBD {
        do throws(ControlError) { return try configuration(path).nbd } catch {
            throw BackendError(code: error.code, message: error.message)
        }
    }

    /// The pool of this name in the configuration at this path.
    ///
    /// - Parameter transport: what the volume's name asks for, which goes before the configuration.
    /// - Throws: as `configuration`; code 2 when the file has no such pool.
    func pool(
        _ name: String, _ path: String, transport: Transport? = nil
    ) throws(ControlError) -> any VolumePool {
        let configuration = try configuration(path)
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
        case .local(let folder): return remember(LocalPool(name: name, path: folder), key)
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

    /// Who knows the tenants of the cluster that the configuration at this path names; nil when it names none.
    func conductor(_ path: String) throws(ControlError) -> ConductorClient? {
        let configuration = try configuration(path)
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

    private func load(_ path: String, isMissing: Bool) throws(ConfigurationError) -> DaemonConfiguration {
        guard isMissing, path == defaultPath else { return try DaemonConfiguration.load(path: path) }
        return try DaemonConfiguration(parsing: "", file: path)
    }
}

/// By what a change of a file is noticed.
private struct FileVersion: Equatable {
    private let device: UInt64
    private let inode: UInt64
    private let size: Int64
    private let seconds: Int
    private let nanoseconds: Int

    /// Nil when there is no file.
    init?(_ path: String) {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
        size = Int64(status.st_size)
        seconds = status.st_mtim.tv_sec
        nanoseconds = status.st_mtim.tv_nsec
    }
}

extension VolumeTiming {
    fileprivate init(_ client: DaemonConfiguration.Client) {
        self.init(slowIO: UInt64(client.slowIO), open: UInt64(client.openVolumeTimeout.components.seconds))
    }
}

extension ConductorClient.Endpoint {
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
            connectionsPerStore: client.connectionsPerStore)
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
