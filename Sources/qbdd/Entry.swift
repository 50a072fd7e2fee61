import ArgumentParser
import Control
import Glibc
import Logging
import NBD
import Service

/// The daemon: reads its options, then runs until it is told to stop, or until its one client has gone.
@main
enum Entry {
    static func main() {
        if let status = DeviceProcess.main(CommandLine.arguments) { exit(status) }
        let signals = Signals()
        let options: Options
        do {
            var parsed = try Options.parseAsRoot()
            // The parser's own command for help throws the text.
            guard let given = parsed as? Options else { return try parsed.run() }
            options = given
            try options.validatePaths()
        } catch {
            exit(complain(error))
        }
        let log = StandardErrorLog(program: "qbdd", level: options.logLevel)
        LoggingSystem.bootstrap { _ in log }
        // Before any other thread: they take over what the first one has.
        if options.serve == nil {
            for warning in MemoryPressure.prepare() { Logger(label: "qbdd").warning("\(warning)") }
        }
        Task.detached {
            exit(await run(options, signals))
        }
        signals.take()
    }

    /// - Returns: the exit status.
    private static func run(_ options: Options, _ signals: Signals) async -> Int32 {
        let logger = Logger(label: "qbdd")
        do throws(ControlError) {
            if options.serve == nil {
                try await Daemon.run(options, signals, logger)
            } else {
                try await SingleServer.run(options, signals, logger)
            }
            return 0
        } catch {
            logger.error("\(error.message)")
            let code = ControlError.documented(error.code)
            return (1..<126).contains(code) ? code : 1
        }
    }

    /// - Returns: the exit status; 0 when help or the version was asked for.
    private static func complain(_ error: any Error) -> Int32 {
        let text = Options.fullMessage(for: error, columns: 80)
        guard Options.exitCode(for: error) == .success else {
            write(text + "\n", to: STDERR_FILENO)
            return UsageError.exitStatus
        }
        write(text.hasSuffix("\n") ? text : text + "\n", to: STDOUT_FILENO)
        return 0
    }

    private static func write(_ text: String, to descriptor: CInt) {
        let bytes = Array(text.utf8)
        // Short texts, and nobody to tell when they cannot be written.
        _ = Glibc.write(descriptor, bytes, bytes.count)
    }
}
