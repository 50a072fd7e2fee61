/// One pass over the lines of a qbd.conf.
///
/// What the daemon does not know is ignored with a warning, so that PureFlash's own pf.conf can be used as it is; what
/// it knows must be right.
struct DaemonConfigurationParser {
    private(set) var configuration: DaemonConfiguration

    private var lines: LineReader
    private var line = 0
    private var section = CurrentSection.none
    private var poolSections: [PoolSection] = []
    private var poolIndices: [String: Int] = [:]
    private var lastLines: [Key: Int] = [:]
    private var clusterSectionName: String?
    private var suppressedWarnings = 0

    private enum CurrentSection {
        /// Before the first header.
        case none
        case known(String)
        /// Index into `poolSections`.
        case pool(Int)
        case ignored
    }

    private struct Key: Hashable {
        let section: String
        let name: String
    }

    private struct PoolSection {
        let name: String
        /// Of its first header.
        let line: Int
        var type: PoolType?
        var path: String?
        var pathLine = 0
    }

    private enum PoolType: String, CaseIterable {
        case local
        case memory
    }

    /// More than this are counted, not kept: a file that is something else must not flood the log.
    private static let maximumWarnings = 100

    init(_ bytes: [UInt8], file: String) throws(ConfigurationError) {
        lines = try LineReader(bytes, file: file)
        configuration = DaemonConfiguration(defaultsFor: file)
    }

    mutating func run() throws(ConfigurationError) {
        while let next = try lines.next() {
            line = next.number
            do throws(ConfigurationError) {
                try read(next.text)
            } catch {
                throw error.placed(at: line, in: configuration.file)
            }
        }
        settleClusterName()
        settleStorePorts()
        try settlePools()
        if suppressedWarnings > 0 {
            configuration.warnings.append("\(configuration.file): \(suppressedWarnings) more warnings are not shown")
        }
    }

    private mutating func read(_ text: String) throws(ConfigurationError) {
        if let name = try Grammar.section(of: text) {
            return try enter(section: name)
        }
        switch section {
        case .ignored:
            // Another program's section: its lines need not follow our grammar.
            return
        case .none:
            let (key, _) = try Grammar.setting(of: text)
            warn("key \(excerpt(key)) stands before the first [section] and is ignored")
        case .known(let name):
            let (key, value) = try Grammar.setting(of: text)
            try set(key, to: value, in: name)
        case .pool(let index):
            let (key, value) = try Grammar.setting(of: text)
            try set(key, to: value, inPool: index)
        }
    }

    private mutating func enter(section name: String) throws(ConfigurationError) {
        switch name {
        case "zookeeper", "cluster", "conductor", "client", "nbd":
            section = .known(name)
        case _ where name.hasPrefix("pool."):
            let pool = String(name.dropFirst("pool.".count))
            try VolumeName.validate(component: pool, as: "pool name in [\(printable(name))]")
            section = .pool(poolIndex(pool))
        default:
            section = .ignored
            warn("unknown section [\(printable(name))] is ignored")
        }
    }

    private mutating func poolIndex(_ name: String) -> Int {
        if let index = poolIndices[name] {
            return index
        }
        poolIndices[name] = poolSections.count
        poolSections.append(PoolSection(name: name, line: line))
        return poolSections.count - 1
    }
}

// MARK: - Settings

extension DaemonConfigurationParser {
    private mutating func set(_ key: String, to value: String, in section: String) throws(ConfigurationError) {
        switch (section, key) {
        case ("zookeeper", "ip"):
            configuration.zookeeper.ip = try Value.addresses(value, of: key, defaultPort: nil)
        case ("zookeeper", "cluster_name"):
            configuration.zookeeper.clusterName = try Value.clusterName(value, of: key)
        case ("cluster", "name"):
            clusterSectionName = try Value.clusterName(value, of: key)
        case ("conductor", "endpoints"):
            configuration.conductor.endpoints = try Value.addresses(
                value, of: key, defaultPort: DaemonConfiguration.Conductor.defaultPort)
        case ("client", "tcp_no_delay"):
            configuration.client.tcpNoDelay = try Value.flag(value, of: key)
        case ("client", "store_port"):
            configuration.client.storePort = try Value.integer(value, of: key, in: 1...65535)
        case ("client", "store_http_port"):
            configuration.client.storeHTTPPort = try Value.integer(value, of: key, in: 1...65535)
        case ("client", "store_grace"):
            configuration.client.storeGrace = try Value.seconds(value, of: key)
        case ("client", "io_depth"):
            configuration.client.ioDepth = try Value.integer(value, of: key, in: 1...255)
        case ("client", "connections_per_store"):
            configuration.client.connectionsPerStore = try Value.integer(value, of: key, in: 1...8)
        case ("client", "io_timeout"):
            configuration.client.ioTimeout = try Value.seconds(value, of: key)
        case ("client", "conn_timeout"):
            configuration.client.connTimeout = try Value.seconds(value, of: key)
        case ("client", "open_volume_timeout"):
            configuration.client.openVolumeTimeout = try Value.seconds(value, of: key)
        case ("client", "slow_io_ms"):
            configuration.client.slowIO = try Value.integer(value, of: key, in: 10...3_600_000, unit: "milliseconds")
        case ("client", "conn_type"):
            configuration.client.connType = try Value.choice(value, of: key)
        case ("nbd", "listen"):
            configuration.nbd.listen = try Value.listenAddress(value, of: key)
        case ("nbd", "max_connections"):
            configuration.nbd.maxConnections = try Value.integer(value, of: key, in: 1...1024)
        case ("nbd", "connections"):
            configuration.nbd.connections = try Value.integer(value, of: key, in: 1...4)
        case ("nbd", "reattach_timeout"):
            configuration.nbd.reattachTimeout = try Value.seconds(value, of: key)
        default:
            return warnUnknown(key, in: section)
        }
        note(key, in: section)
    }

    private mutating func set(_ key: String, to value: String, inPool index: Int) throws(ConfigurationError) {
        let section = "pool.\(poolSections[index].name)"
        switch key {
        case "type":
            poolSections[index].type = try Value.choice(value, of: key)
        case "path":
            poolSections[index].path = try Value.directory(value, of: key)
            poolSections[index].pathLine = line
        default:
            return warnUnknown(key, in: section)
        }
        note(key, in: section)
    }

    /// Remembers where a key was set; the later of two wins, with a warning.
    private mutating func note(_ key: String, in section: String) {
        let earlier = lastLines.updateValue(line, forKey: Key(section: section, name: key))
        if let earlier {
            warn("key '\(key)' in section [\(printable(section))] was set in line \(earlier) already; this one counts")
        }
    }

    private mutating func warnUnknown(_ key: String, in section: String) {
        warn("unknown key \(excerpt(key)) in section [\(printable(section))] is ignored")
    }

    private mutating func warn(_ message: String, at line: Int? = nil) {
        guard configuration.warnings.count < Self.maximumWarnings else {
            suppressedWarnings += 1
            return
        }
        configuration.warnings.append("\(configuration.file):\(line ?? self.line): \(message)")
    }
}

// MARK: - After the last line

extension DaemonConfigurationParser {
    /// PureFlash's own stores have one port for data and one for their conductor, always: with another one for data, the
    /// other is not known.
    private mutating func settleStorePorts() {
        guard configuration.client.storePort != DaemonConfiguration.Client().storePort,
            lastLines[Key(section: "client", name: "store_http_port")] == nil
        else { return }
        configuration.client.storeHTTPPort = nil
    }

    /// `[zookeeper] cluster_name` is qbd's own place for the name, `[cluster] name` is pf.conf's.
    private mutating func settleClusterName() {
        guard let alternate = clusterSectionName else { return }
        guard let name = configuration.zookeeper.clusterName else {
            configuration.zookeeper.clusterName = alternate
            return
        }
        if name != alternate {
            warn(
                "key 'name' in section [cluster] is ignored: cluster_name in section [zookeeper] says otherwise",
                at: lastLines[Key(section: "cluster", name: "name")])
        }
    }

    private mutating func settlePools() throws(ConfigurationError) {
        var owners: [String: String] = [:]
        for section in poolSections {
            let kind: PoolKind
            switch (section.type, section.path) {
            case (.local, let path?):
                // One file under two names would be written by two volumes that do not know of each other.
                if let owner = owners.updateValue(section.name, forKey: path) {
                    throw ConfigurationError(
                        "[pool.\(printable(section.name))] has the directory of [pool.\(printable(owner))];"
                            + " give each pool its own",
                        file: configuration.file, line: section.pathLine)
                }
                kind = .local(path: path)
            case (.local, nil):
                throw fault("has no 'path'; add path = DIRECTORY", in: section)
            case (.memory, let path):
                if path != nil {
                    warn(
                        "key 'path' in section [pool.\(printable(section.name))] is ignored: a memory pool has none",
                        at: section.pathLine)
                }
                kind = .memory
            case (nil, _):
                throw fault("has no 'type'; add type = local with path = DIRECTORY, or type = memory", in: section)
            }
            configuration.pools[section.name] = PoolConfiguration(name: section.name, kind: kind)
        }
    }

    private func fault(_ message: String, in section: PoolSection) -> ConfigurationError {
        ConfigurationError(
            "section [pool.\(printable(section.name))] \(message)", file: configuration.file, line: section.line)
    }
}
