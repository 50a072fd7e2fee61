import Backend
import Configuration
import Control
import Glibc
import Logging
import Service
import Volumes

/// The daemon's life, from its first socket to its last.
enum Daemon {
    /// Seconds between two tries to listen on an address that was not to be had.
    private static let listenPause: UInt64 = 2

    static func run(_ options: Options, _ signals: Signals, _ logger: Logger) async throws(ControlError) {
        raiseDescriptorLimit(logger)
        let pools = PoolDirectory(defaultPath: options.isConfigNamed ? nil : options.configPath, logger: logger)
        let configuration = try await pools.configuration(options.configPath, for: .daemon)

        // The control socket's path is taken first and opened last: who is answered there finds everything running.
        let path: ControlPath
        do throws(ControlError) { path = try ControlPath.reserve(options.socketPath) } catch {
            throw error.advising("--socket")
        }
        let manager = try await makeManager(options, configuration, logger)
        do throws(BackendError) {
            try await manager.restore { (pool, config) throws(BackendError) in
                do throws(ControlError) {
                    let configuration = try await pools.configuration(config, for: .daemon)
                    return (
                        try await pools.pool(pool, of: configuration, config, transport: .tcp),
                        VolumeTiming(configuration.client)
                    )
                } catch {
                    throw BackendError(code: error.code, message: error.message)
                }
            }
        } catch {
            // The devices of another daemon wait for one that can read what it left.
            await manager.shutdown()
            throw ControlError(error)
        }
        let listening = try await listen(manager, configuration, options, logger)
        defer { listening?.cancel() }
        // What an earlier daemon did not get done.
        for name in configuration.pools.keys.sorted() {
            do throws(ControlError) {
                manager.tidy(try await pools.pool(name, of: configuration, options.configPath))
            } catch {
                logger.error("\(error.message)")
            }
        }
        let server: ControlServer
        do throws(ControlError) {
            server = try await ControlServer(
                at: path, service: DaemonService(manager: manager, pools: pools, logger: logger, caller: .daemon),
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
        manager.giveUpMaps()
        await server.stop()
        await manager.shutdown()
        logger.info("stopped")
    }

    private static func makeManager(
        _ options: Options, _ configuration: DaemonConfiguration, _ logger: Logger
    ) async throws(ControlError) -> VolumeManager {
        let manager: VolumeManager
        do throws(BackendError) {
            manager = try VolumeManager(
                nbdSocketPath: options.nbdSocketPath, maximumConnections: configuration.nbd.maxConnections,
                deviceSettings: DeviceSettings(configuration.nbd), statePath: options.statePath, logger: logger)
        } catch {
            throw ControlError(error).advising("--state")
        }
        do throws(BackendError) { try await manager.start() } catch {
            await manager.shutdown()
            throw ControlError(error).advising("--nbd-socket")
        }
        return manager
    }

    /// Listens on the TCP address that is configured. Where devices were taken over, one that is not to be had, because
    /// the network is not up or somebody else has the port, does not end them: it is tried again.
    /// - Returns: what tries, where that is needed.
    private static func listen(
        _ manager: VolumeManager, _ configuration: DaemonConfiguration, _ options: Options, _ logger: Logger
    ) async throws(ControlError) -> Task<Void, Never>? {
        guard let address = configuration.nbd.listen else { return nil }
        do throws(ControlError) {
            try await serve(manager, at: address, options, logger)
            return nil
        } catch {
            guard manager.hasMappings else {
                await manager.shutdown()
                throw error
            }
            logger.error("\(error.message); trying again every \(listenPause) s")
        }
        return Task {
            // Cancelled when the daemon stops.
            while (try? await Task.sleep(nanoseconds: listenPause * 1_000_000_000)) != nil {
                if (try? await serve(manager, at: address, options, logger)) != nil { return }
            }
        }
    }

    private static func serve(
        _ manager: VolumeManager, at listen: NetworkAddress, _ options: Options, _ logger: Logger
    ) async throws(ControlError) {
        do throws(BackendError) {
            let port = try await manager.listen(host: listen.host, port: listen.port)
            logger.info("NBD clients are served at \(listen.with(port: port)), without encryption or passwords")
        } catch {
            let remedy =
                switch error.code {
                case EADDRINUSE: "name a port that is free"
                case EACCES, EPERM: "be root, or name a port from 1024 on"
                default: "name an address of this host"
                }
            throw ControlError(
                BackendError(
                    code: error.code,
                    message: "\(options.configPath): [nbd] listen = \(listen): \(error.message); \(remedy)"))
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

extension ControlError {
    /// The same with what to do when this user may not use a path.
    /// - Parameter option: names another path.
    fileprivate func advising(_ option: String) -> ControlError {
        switch code {
        case EACCES, EPERM, EROFS: ControlError(code, "\(message); be root, or name another path with \(option)")
        default: self
        }
    }
}
