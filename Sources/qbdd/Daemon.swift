import Backend
import Configuration
import Control
import Glibc
import Logging
import Service
import Volumes

/// The daemon's life, from its first socket to its last.
enum Daemon {
    static func run(_ options: Options, _ signals: Signals, _ logger: Logger) async throws(ControlError) {
        raiseDescriptorLimit(logger)
        let pools = PoolDirectory(defaultPath: options.isConfigNamed ? nil : options.configPath, logger: logger)
        let configuration = try await pools.configuration(options.configPath)

        // The control socket's path is taken first and opened last: who is answered there finds everything running.
        let path = try ControlPath.reserve(options.socketPath)
        let manager = try await makeManager(options, configuration, logger)
        await manager.restore { (pool, config) throws(BackendError) in
            do throws(ControlError) {
                return (try await pools.pool(pool, config, transport: .tcp), try await pools.timing(config))
            } catch {
                throw BackendError(code: error.code, message: error.message)
            }
        }
        // What an earlier daemon did not get done.
        for name in configuration.pools.keys.sorted() {
            do throws(ControlError) { manager.tidy(try await pools.pool(name, options.configPath)) } catch {
                logger.error("\(error.message)")
            }
        }
        let server: ControlServer
        do throws(ControlError) {
            server = try await ControlServer(
                at: path, service: DaemonService(manager: manager, pools: pools, logger: logger),
                report: { logger.warning("\($0)") })
        } catch {
            await manager.shutdown()
            throw error
        }
        logger.info("qbdd \(ProductVersion.string) runs, control socket \(server.path), NBD \(options.nbdSocketPath)")
        Readiness.tell("READY=1\nSTATUS=Serving NBD at \(options.nbdSocketPath)", logger)

        let signal = await signals.first()
        logger.info("\(signal) came, stopping")
        Readiness.tell("STOPPING=1", logger)
        await server.stop()
        await manager.shutdown()
        logger.info("stopped")
    }

    private static func makeManager(
        _ options: Options, _ configuration: DaemonConfiguration, _ logger: Logger
    ) async throws(ControlError) -> VolumeManager {
        do throws(BackendError) {
            let manager = try VolumeManager(
                nbdSocketPath: options.nbdSocketPath,
                tcpListen: configuration.nbd.listen.map { (host: $0.host, port: $0.port) },
                maximumConnections: configuration.nbd.maxConnections,
                deviceSettings: DeviceSettings(configuration.nbd),
                statePath: options.statePath, logger: logger)
            do throws(BackendError) {
                try await manager.start()
            } catch {
                await manager.shutdown()
                throw error
            }
            return manager
        } catch {
            throw ControlError(error)
        }
    }

    /// Each mapped volume takes some descriptors and each client one; the soft limit is usually 1024.
    private static func raiseDescriptorLimit(_ logger: Logger) {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0, limit.rlim_cur < limit.rlim_max
        else { return }
        limit.rlim_cur = limit.rlim_max
        if setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) != 0 {
            logger.warning("cannot raise the limit of open files to \(limit.rlim_max): errno \(errno)")
        }
    }
}
