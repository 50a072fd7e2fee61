import ArgumentParser
import Control
import Glibc
import Logging

/// The daemon: reads its options, then runs until it is told to stop, or until its one client has gone.
@main
enum Entry {
    static func main() async {
        // Before any other thread exists: all of them inherit that these signals are not theirs.
        Signals.block()
        let options: Options
        do {
            guard let parsed = try Options.parseAsRoot() as? Options else { return }
            options = parsed
            try options.validatePaths()
        } catch {
            exit(complain(error))
        }
        let log = StandardErrorLog(level: options.logLevel)
        LoggingSystem.bootstrap { _ in log }
        let logger = Logger(label: "qbdd")
        do throws(ControlError) {
            try await options.serve == nil ? Daemon.run(options, logger) : SingleServer.run(options, logger)
        } catch {
            logger.error("\(error.message)")
            exit((1..<126).contains(error.code) ? error.code : 1)
        }
        exit(0)
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
