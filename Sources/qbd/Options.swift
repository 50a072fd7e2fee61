import ArgumentParser
import Configuration
import Control
import Glibc

/// What every verb takes.
struct CommonOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The control socket of qbdd; else QBD_SOCKET, else \(ControlClient.defaultSocketPath).",
            valueName: "path"), completion: .file())
    var socket: String?

    @Option(help: ArgumentHelp("Give up after this many seconds (200).", valueName: "seconds"))
    var timeout: UInt32?

    @Flag(help: "Print JSON.")
    var json = false

    @Flag(name: [.customShort("V"), .long], help: "Say more, on stderr.")
    var verbose = false

    /// The daemon that is meant.
    var client: ControlClient {
        client(timeout: timeout.map { .seconds(Int64($0)) } ?? ControlClient.defaultTimeout)
    }

    private func client(timeout: Duration) -> ControlClient {
        ControlClient(path: socket ?? Environment["QBD_SOCKET"] ?? ControlClient.defaultSocketPath, timeout: timeout)
    }

    /// Asks the daemon.
    /// - Parameter seconds: to wait for the answer; nil is what `--timeout` says.
    func ask<Request: ControlRequest>(
        _ request: Request, within seconds: UInt64? = nil
    ) async throws(Failure) -> Request.Answer {
        try await Mapper(client: seconds.map { client(timeout: .seconds(Int64($0))) } ?? client).ask(request)
    }
}

/// The configuration file, which the daemon reads.
struct ConfigOption: ParsableArguments {
    @Option(
        name: [.customShort("c"), .long],
        help: ArgumentHelp(
            "The configuration file; else QBD_CONFIG, else \(DaemonConfiguration.defaultPath).", valueName: "config"),
        completion: .file())
    var config: String?

    /// The file to use, as an absolute path.
    func path(for command: Command) throws(Failure) -> String {
        if let path = try explicitPath(for: command) { return path }
        return try Self.standardPath(for: command)
    }

    /// The file to use when none is named.
    static func standardPath(for command: Command) throws(Failure) -> String {
        try absolute(Environment["QBD_CONFIG"] ?? DaemonConfiguration.defaultPath, command)
    }

    /// The file that was named with `-c`, as an absolute path.
    func explicitPath(for command: Command) throws(Failure) -> String? {
        guard let config else { return nil }
        return try Self.absolute(config, command)
    }

    private static func absolute(_ path: String, _ command: Command) throws(Failure) -> String {
        try checked(for: command) { () throws(ControlError) in
            try ConfigPath.validate(path.hasPrefix("/") || path.isEmpty ? path : try currentFolder() + "/" + path)
        }
    }

    private static func currentFolder() throws(ControlError) -> String {
        guard let folder = getcwd(nil, 0) else {
            throw ControlError(errno, "cannot find the current folder, to which the path of -c is relative")
        }
        defer { free(folder) }
        return String(cString: folder)
    }
}

/// The environment's variables; one that is empty counts as not set.
enum Environment {
    static subscript(name: String) -> String? {
        guard let value = getenv(name), value.pointee != 0 else { return nil }
        return String(cString: value)
    }
}

/// Makes an error of what was given to a command an error of that command.
func checked<Value>(for command: Command, _ body: () throws(ControlError) -> Value) throws(Failure) -> Value {
    do throws(ControlError) {
        return try body()
    } catch {
        throw Failure(command, error)
    }
}

/// Names and sizes, checked here before anybody is asked.
enum Name {
    /// A volume that this version can reach.
    static func volume(
        _ text: String, for command: Command, snapshot: VolumeName.SnapshotPart = .none
    ) throws(Failure) -> VolumeName {
        try checked(for: command) { () throws(ControlError) in try VolumeName.reachable(text, snapshot: snapshot) }
    }

    static func checkPool(_ text: String, for command: Command) throws(Failure) {
        do throws(ConfigurationError) {
            try VolumeName.validate(component: text, as: "pool name")
        } catch {
            throw Failure(command, .invalid("\(error)"))
        }
    }

    /// Bytes.
    static func size(_ text: String, for command: Command) throws(Failure) -> UInt64 {
        do throws(ConfigurationError) {
            return try Quantity.parseSize(text)
        } catch {
            throw Failure(command, .invalid("\(error)"))
        }
    }
}
