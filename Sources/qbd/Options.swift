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

    @Option(help: ArgumentHelp("Give up after this many seconds, 1 to 86400 (200).", valueName: "seconds"))
    var timeout: String?

    @Flag(help: "Print JSON.")
    var json = false

    @Flag(name: [.customShort("V"), .long], help: "Say more, on stderr.")
    var verbose = false

    /// What `--timeout` says; nil when it is not given.
    func givenTimeout(for command: Command) throws(Failure) -> Duration? {
        guard let timeout else { return nil }
        do throws(ConfigurationError) { return try Value.seconds(timeout, of: "--timeout") } catch {
            throw Failure(command, .invalid("\(error)"))
        }
    }

    /// The daemon that is meant.
    /// - Parameter time: to wait for an answer; nil is what `--timeout` says.
    func client(for command: Command, within time: Duration? = nil) throws(Failure) -> ControlClient {
        let given = try givenTimeout(for: command)
        return ControlClient(
            path: socket ?? Environment["QBD_SOCKET"] ?? ControlClient.defaultSocketPath,
            timeout: time ?? given ?? ControlClient.defaultTimeout)
    }

    /// Asks the daemon.
    /// - Parameter time: to wait for the answer; nil is what `--timeout` says.
    func ask<Request: ControlRequest>(
        _ request: Request, within time: Duration? = nil
    ) async throws(Failure) -> Request.Answer {
        try await Mapper(client: try client(for: Request.command, within: time)).ask(request)
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
            try ConfigPath.validate(ConfigPath.canonical(path.hasPrefix("/") ? path : try currentFolder() + "/" + path))
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

    /// Bytes. What is no size is wrong usage.
    static func size(_ text: String, for verb: Verb) throws(UsageError) -> UInt64 {
        do throws(ConfigurationError) { return try Quantity.parseSize(text) } catch {
            throw UsageError("\(error)", verb: verb)
        }
    }
}
