/// What qbd.conf says, with the defaults where it says nothing. qbd.conf(5) describes every key.
package struct DaemonConfiguration: Sendable {
    /// The file's path as it was given, for texts that say where to change something.
    package let file: String
    /// What was read but has no effect or probably not the meant one, each with file and line, in the file's order.
    package internal(set) var warnings: [String] = []

    package internal(set) var zookeeper = ZooKeeper()
    package internal(set) var conductor = Conductor()
    package internal(set) var client = Client()
    package internal(set) var nbd = NBD()
    /// By name, from the sections `[pool.NAME]`.
    package internal(set) var pools: [String: PoolConfiguration] = [:]

    /// The defaults: what an empty file means.
    init(defaultsFor file: String) {
        self.file = file
    }

    /// Section `[zookeeper]`: where a PureFlash cluster's conductor is found.
    package struct ZooKeeper: Hashable, Sendable {
        /// Each `host:port`; empty when no ZooKeeper is configured.
        package internal(set) var ip: [String] = []
        /// Also from `[cluster] name`. One component of a ZooKeeper path.
        package internal(set) var clusterName: String?
    }

    /// Section `[conductor]`: conductors by address, without ZooKeeper.
    package struct Conductor: Hashable, Sendable {
        /// Each `host:port`, in the order to try them; empty when ZooKeeper is to be asked.
        package internal(set) var endpoints: [String] = []
        /// The port a conductor's HTTP server listens on.
        package static let defaultPort: UInt16 = 49180
    }

    /// Section `[client]`: the connections to the stores.
    package struct Client: Hashable, Sendable {
        /// TCP_NODELAY on connections to stores.
        package internal(set) var tcpNoDelay = true
        /// Requests in flight on one connection, 1 to 255.
        package internal(set) var ioDepth = 64
        /// Connections of one volume to one store, 1 to 8.
        package internal(set) var connectionsPerStore = 1
        /// TCP port of the stores' data connections.
        package internal(set) var storePort = 49162
        /// TCP port on which a conductor tells stores things; nil where it is not known, because the data port is not
        /// the usual one either.
        package internal(set) var storeHTTPPort: Int? = 49181
        /// How long a conductor may believe in a store that has died.
        package internal(set) var storeGrace = Duration.seconds(6)
        /// How long one I/O may take, retries included, before it fails.
        package internal(set) var ioTimeout = Duration.seconds(30)
        /// How long connecting to a store may take.
        package internal(set) var connTimeout = Duration.seconds(8)
        /// How long opening a volume may take.
        package internal(set) var openVolumeTimeout = Duration.seconds(180)
        /// Milliseconds from which on an I/O is told as slow, 10 to 3600000.
        package internal(set) var slowIO = 2000
        /// For names without a scheme.
        package internal(set) var connType = Transport.tcp
    }

    /// Section `[nbd]`: the NBD server.
    package struct NBD: Hashable, Sendable {
        /// The TCP address to listen on beside the Unix socket; port 0 is one that the kernel chooses. Nil: no TCP.
        package internal(set) var listen: NetworkAddress?
        /// Connections that one export accepts at the same time, 1 to 1024.
        package internal(set) var maxConnections = 64
        /// Sockets between the kernel and the daemon for one device, 1 to 4.
        package internal(set) var connections = 1
        /// How long a device's I/O waits for a daemon that is away.
        package internal(set) var reattachTimeout = Duration.seconds(120)
    }
}

/// One section `[pool.NAME]`.
package struct PoolConfiguration: Hashable, Sendable {
    package let name: String
    package let kind: PoolKind

    package init(name: String, kind: PoolKind) {
        self.name = name
        self.kind = kind
    }
}

/// Where the volumes of a pool live.
package enum PoolKind: Hashable, Sendable {
    /// As files in this directory, an absolute path.
    case local(path: String)
    /// In the daemon's memory: gone when it ends.
    case memory
    /// In a PureFlash cluster, where the pool is a tenant.
    case pureFlash(
        DaemonConfiguration.ZooKeeper, DaemonConfiguration.Conductor, DaemonConfiguration.Client)
}

extension DaemonConfiguration {
    /// Whether names of pools that have no section are tenants of a cluster.
    package var hasCluster: Bool { !conductor.endpoints.isEmpty || !zookeeper.ip.isEmpty }

    /// The pool a volume's name speaks of: one with a section, or else a tenant of the cluster, if one is configured.
    ///
    /// - Throws: an error that names the pool, the file, and the section to add.
    package func pool(named name: String) throws(ConfigurationError) -> PoolConfiguration {
        if let pool = pools[name] { return pool }
        guard hasCluster else {
            throw ConfigurationError(
                "pool \(excerpt(name)) is not configured; add a section [pool.\(printable(name))] with type = local and"
                    + " path = DIRECTORY to \(file)")
        }
        return PoolConfiguration(name: name, kind: .pureFlash(zookeeper, conductor, client))
    }
}
