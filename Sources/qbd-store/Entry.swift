import ArgumentParser
import Backend
import Configuration
import Glibc
import Logging
import Service
import StoreServer

/// The store: reads its options and pools, then runs until it is told to stop.
@main
enum Entry {
    static func main() {
        let signals = Signals()
        let options: Options
        do {
            var parsed = try Options.parseAsRoot()
            // The parser's own command for help throws the text.
            guard let given = parsed as? Options else { return try parsed.run() }
            options = given
        } catch {
            exit(complain(error))
        }
        let log = StandardErrorLog(program: "qbd-store", level: options.logLevel)
        LoggingSystem.bootstrap { _ in log }
        Task.detached {
            exit(await run(options, signals))
        }
        signals.take()
    }

    /// - Returns: the exit status.
    private static func run(_ options: Options, _ signals: Signals) async -> Int32 {
        let logger = Logger(label: "qbd-store")
        do {
            let configuration = try DaemonConfiguration.load(path: options.configPath)
            for warning in configuration.warnings { logger.warning("\(warning)") }
            if configuration.pools.isEmpty {
                logger.warning("\(options.configPath) has no pools, so there are no tenants; add sections [pool.NAME]")
            }
            raiseDescriptorLimit(logger)
            let server = try await StoreServer(try options.settings(configuration), logger: logger)
            if options.allowFaults { logger.warning("fault switches are on: every client can make this store fail") }
            let conductor = options.noConductor ? "" : ", conductor port \(options.conductorPort)"
            let ports = "data port \(options.dataPort), store port \(options.storePort)\(conductor)"
            logger.info("qbd-store runs at \(options.listen), \(ports)")
            Readiness.tell("READY=1", logger)
            let signal = await signals.first()
            logger.info("\(signal) came, stopping")
            Readiness.tell("STOPPING=1", logger)
            await server.stop()
            logger.info("stopped")
            return 0
        } catch {
            let isForeign = (error as? BackendError)?.code == EADDRNOTAVAIL
            logger.error("\(isForeign ? "--listen has to be an address of this host: " : "")\(error)")
            return status(error)
        }
    }

    private static func status(_ error: any Error) -> Int32 {
        let code =
            switch error {
            case let error as BackendError: error.code
            case let error as ConfigurationError: error.systemError ?? EINVAL
            default: EIO
            }
        return (1..<126).contains(code) ? code : 1
    }

    /// Each open volume takes some descriptors and each client one; the soft limit is usually 1024.
    private static func raiseDescriptorLimit(_ logger: Logger) {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0, limit.rlim_cur < limit.rlim_max
        else { return }
        limit.rlim_cur = limit.rlim_max
        if setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) != 0 {
            logger.warning("cannot raise the limit of open files to \(limit.rlim_max): errno \(errno)")
        }
    }

    /// - Returns: the exit status; 0 when help or the version was asked for.
    private static func complain(_ error: any Error) -> Int32 {
        let text = Options.fullMessage(for: error, columns: 80)
        let failed = Options.exitCode(for: error) != .success
        let bytes = Array((text.hasSuffix("\n") ? text : text + "\n").utf8)
        // Short texts, and nobody to tell when they cannot be written.
        _ = write(failed ? STDERR_FILENO : STDOUT_FILENO, bytes, bytes.count)
        return failed ? 64 : 0
    }
}
