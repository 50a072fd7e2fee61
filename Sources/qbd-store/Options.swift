import ArgumentParser
import Configuration
import Control
import Glibc
import Logging
import PureFlash
import StoreServer

/// What qbd-store is told on its command line.
struct Options: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "qbd-store",
        abstract: "Serves the volumes of local pools as a PureFlash store and conductor.",
        version: "qbd-store \(ProductVersion.string)")

    @Option(
        name: [.customShort("c"), .long],
        help: ArgumentHelp(
            "The configuration with the pools; else QBD_CONFIG, else \(DaemonConfiguration.defaultPath).",
            valueName: "path"))
    var config: String?

    @Option(
        help: ArgumentHelp("The IPv4 address to listen on; clients know the store by it.", valueName: "address"))
    var listen = "127.0.0.1"

    @Option(help: ArgumentHelp("The port for data.", valueName: "port"))
    var dataPort = StoreProtocol.port

    @Option(help: ArgumentHelp("The port of the conductor.", valueName: "port"))
    var conductorPort = DaemonConfiguration.Conductor.defaultPort

    @Option(help: ArgumentHelp("The port a conductor tells stores at.", valueName: "port"))
    var storePort = StoreProtocol.httpPort

    @Option(
        help: ArgumentHelp(
            "The stores that serve the shards of new volumes, in turn; this one alone when none are named.",
            valueName: "address,..."),
        transform: { $0.split(separator: ",").map(String.init) })
    var stores: [String]?

    @Flag(help: "Be a store alone: another qbd-store is the conductor.")
    var noConductor = false

    @Flag(help: "Register the conductor in the ZooKeeper that the configuration names.")
    var register = false

    @Flag(help: "Acknowledge writes only when they are on stable storage.")
    var sync = false

    @Flag(help: "Let requests turn fault switches; for tests.")
    var allowFaults = false

    @Option(
        help: ArgumentHelp(
            "The least that is logged: trace, debug, info, notice, warning, error or critical.", valueName: "level"),
        transform: Self.level(_:))
    var logLevel = Logger.Level.info

    private static func level(_ text: String) throws -> Logger.Level {
        guard let level = Logger.Level(rawValue: text) else { throw ValidationError("'\(text)' is no log level") }
        return level
    }

    func validate() throws {
        if config?.isEmpty ?? false { throw ValidationError("the path of --config is empty") }
        for address in [listen] + (stores ?? []) {
            var parsed = in_addr()
            guard inet_pton(AF_INET, address, &parsed) == 1 else {
                throw ValidationError("'\(address)' is no IPv4 address")
            }
            guard parsed.s_addr != INADDR_ANY else {
                throw ValidationError(
                    "'\(address)' is every address of this host, and clients are told it: name one that they reach")
            }
        }
        if let stores {
            if noConductor { throw ValidationError("--stores goes to the conductor, and this is none") }
            if stores.isEmpty { throw ValidationError("--stores names no store") }
            if Set(stores).count != stores.count { throw ValidationError("--stores names a store twice") }
        }
        if register, noConductor { throw ValidationError("--register is for a conductor, and this is none") }
        let ports = noConductor ? [dataPort, storePort] : [dataPort, storePort, conductorPort]
        if ports.contains(0) { throw ValidationError("a port is a number from 1 to 65535") }
        if Set(ports).count != ports.count { throw ValidationError("the ports must be different") }
    }

    /// A variable that is empty counts as not set.
    var configPath: String {
        if let config { return config }
        guard let value = getenv("QBD_CONFIG"), value.pointee != 0 else { return DaemonConfiguration.defaultPath }
        return String(cString: value)
    }

    func settings(_ configuration: DaemonConfiguration) throws(ConfigurationError) -> StoreServer.Settings {
        guard !register || !configuration.zookeeper.ip.isEmpty else {
            throw ConfigurationError(
                "--register needs to know where: add ip = HOST:PORT to section [zookeeper]", file: configPath)
        }
        return StoreServer.Settings(
            address: listen, conductorPort: noConductor ? nil : conductorPort, dataPort: dataPort,
            storePort: storePort, stores: stores ?? [listen], durable: sync, allowFaults: allowFaults,
            pools: configuration.pools.values.sorted { $0.name < $1.name },
            zookeeper: register ? configuration.zookeeper : nil)
    }
}
