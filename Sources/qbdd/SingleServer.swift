import Backend
import Configuration
import Control
import EventLoop
import Glibc
import Logging
import Service
import Volumes

/// `--serve`: one volume on a socket that another process made, for clients that start their server themselves.
enum SingleServer {
    static func run(_ options: Options, _ signals: Signals, _ logger: Logger) async throws(ControlError) {
        let name = try VolumeName.reachable(options.serve ?? "", snapshot: .allowed)
        let descriptor = try inheritedSocket()
        let pools = PoolDirectory(defaultPath: options.isConfigNamed ? nil : options.configPath, logger: logger)
        let configuration = try await pools.configuration(options.configPath, for: .daemon)
        let pool = try await pools.pool(name.pool, of: configuration, options.configPath, transport: name.transport)
        do throws(BackendError) {
            let manager = try VolumeManager(
                nbdSocketPath: options.nbdSocketPath,
                maximumConnections: configuration.nbd.maxConnections,
                deviceSettings: DeviceSettings(connections: 1, reattachTimeout: 0), statePath: nil, logger: logger)
            let stopper = Task {
                let signal = await signals.first()
                logger.info("\(signal) came, stopping")
                await manager.shutdown()
            }
            try await manager.serve(
                pool, volume: name.inPool,
                options: MapOptions(
                    target: .export, readOnly: options.readOnly || name.snapshot != nil, configPath: options.configPath,
                    timing: VolumeTiming(configuration.client)),
                listenDescriptor: descriptor)
            stopper.cancel()
        } catch {
            throw ControlError(error)
        }
    }

    /// The one listening socket handed over as sd_listen_fds(3) describes: descriptor 3.
    private static func inheritedSocket() throws(ControlError) -> CInt {
        let first: CInt = 3
        if let owner = variable("LISTEN_PID"), owner != String(getpid()) {
            throw .invalid("LISTEN_PID is \(owner), so the sockets of LISTEN_FDS are for another process")
        }
        guard let count = variable("LISTEN_FDS") else {
            throw .invalid(
                "--serve needs a listening socket as descriptor 3 and LISTEN_FDS=1 in the environment, as systemd's"
                    + " socket activation hands it over")
        }
        guard count == "1" else { throw .invalid("--serve takes one listening socket, and LISTEN_FDS is \(count)") }
        var listens: CInt = 0
        var size = socklen_t(MemoryLayout<CInt>.size)
        guard getsockopt(first, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0, listens != 0 else {
            throw .invalid("LISTEN_FDS is 1, and descriptor \(first) is not a socket that listens")
        }
        guard fcntl(first, F_SETFD, FD_CLOEXEC) == 0 else {
            throw ControlError(errno, "cannot set up descriptor \(first): \(errnoText(errno))")
        }
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] { unsetenv(name) }
        return first
    }

    private static func variable(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }
}
