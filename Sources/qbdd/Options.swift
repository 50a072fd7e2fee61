import ArgumentParser
import Configuration
import Control
import Glibc
import Logging

/// What qbdd is told on its command line; what it is not told there, the environment says, else the defaults.
struct Options: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "qbdd",
        abstract: "Serves block volumes over NBD; qbd(8) tells it which.",
        version: "qbdd \(ProductVersion.string)")

    @Flag(help: "Stay in the foreground. It always does; for unit files that say so.")
    var foreground = false

    @Option(
        name: [.customShort("c"), .long],
        help: ArgumentHelp(
            "The configuration; else QBD_CONFIG, else \(DaemonConfiguration.defaultPath), which may be missing.",
            valueName: "path"))
    var config: String?

    @Option(
        help: ArgumentHelp(
            "Where to listen for qbd; else QBD_SOCKET, else \(ControlClient.defaultSocketPath).", valueName: "path"))
    var socket: String?

    @Option(
        help: ArgumentHelp(
            "Where to listen for NBD clients; else QBD_NBD_SOCKET, else \(Self.defaultNBDSocket).", valueName: "path"))
    var nbdSocket: String?

    @Option(
        help: ArgumentHelp(
            "The folder for what survives the daemon; else QBD_STATE, else \(Self.defaultState).",
            valueName: "path"))
    var state: String?

    @Option(
        help: ArgumentHelp(
            "The least that is logged: trace, debug, info, notice, warning, error or critical.", valueName: "level"),
        transform: Self.level(_:))
    var logLevel = Logger.Level.info

    @Option(
        help: ArgumentHelp(
            "Serve only this volume, on a listening socket that was inherited as systemd hands it over (LISTEN_FDS), "
                + "and end when the last client has gone. There is no control socket then.",
            valueName: "pool/volume"))
    var serve: String?

    @Flag(help: "With --serve: refuse writes.")
    var readOnly = false

    static let defaultNBDSocket = "/run/qbd/nbd.sock"
    static let defaultState = "/var/lib/qbd"

    private static func level(_ text: String) throws -> Logger.Level {
        guard let level = Logger.Level(rawValue: text) else {
            throw ValidationError("'\(text)' is no log level")
        }
        return level
    }

    func validate() throws {
        if readOnly, serve == nil { throw ValidationError("--read-only goes with --serve only") }
        guard serve != nil else { return }
        for (name, path) in [("--socket", socket), ("--nbd-socket", nbdSocket), ("--state", state)] where path != nil {
            throw ValidationError("\(name) does not go with --serve, which has only the socket that it inherits")
        }
    }
}

// MARK: - Paths

extension Options {
    var socketPath: String { Self.absolute(socket ?? Self.variable("QBD_SOCKET") ?? ControlClient.defaultSocketPath) }
    var nbdSocketPath: String { Self.absolute(nbdSocket ?? Self.variable("QBD_NBD_SOCKET") ?? Self.defaultNBDSocket) }
    var statePath: String { Self.absolute(state ?? Self.variable("QBD_STATE") ?? Self.defaultState) }
    var configPath: String { Self.absolute(namedConfig ?? DaemonConfiguration.defaultPath) }

    /// Whether somebody named the configuration; then it must be there.
    var isConfigNamed: Bool { namedConfig != nil }

    private var namedConfig: String? { config ?? Self.variable("QBD_CONFIG") }

    /// - Throws: a usage error for a path that cannot be used.
    func validatePaths() throws {
        for (name, path) in [
            ("--socket", socket), ("--nbd-socket", nbdSocket), ("--config", config), ("--state", state),
        ]
        where path?.isEmpty ?? false {
            throw ValidationError("the path of \(name) is empty")
        }
        guard serve != nil || socketPath != nbdSocketPath else {
            throw ValidationError("--socket and --nbd-socket are both \(socketPath), and must be two sockets")
        }
    }

    /// A variable that is empty counts as not set.
    private static func variable(_ name: String) -> String? {
        guard let value = getenv(name), value.pointee != 0 else { return nil }
        return String(cString: value)
    }

    private static func absolute(_ path: String) -> String {
        guard !path.hasPrefix("/"), let folder = getcwd(nil, 0) else { return path }
        defer { free(folder) }
        return String(cString: folder) + "/" + path
    }
}
