import Backend
import EventLoop
import Glibc
import LocalPool
import Logging
import NBD
import Synchronization
import Volumes

/// The server's half of the daemon, in this process: one for the whole run.
final class Server: Sendable {
    static let shared = Server()
    static let size: UInt64 = 1 << 20

    /// What a script chooses from; the size is the same for all.
    static let exports = [
        export("memory/v512", block: 512), export("memory/v4096", block: 4096),
        export("shuffled/v512", block: 512), export("memory/readonly", block: 512, readOnly: true),
    ]

    let socketPath = "/tmp/qbd-fuzz-\(getpid()).sock"
    private let manager: VolumeManager

    private init() {
        let logger = Logger(label: "fuzz") { _ in SwiftLogNoOpLogHandler() }
        do {
            let manager = try VolumeManager(
                nbdSocketPath: socketPath, maximumConnections: 64,
                deviceSettings: DeviceSettings(connections: 1, reattachTimeout: 0), statePath: nil, logger: logger)
            self.manager = manager
            waitFor {
                try await manager.start()
                let pools: [any VolumePool] = [MemoryPool(name: "memory"), ShuffledPool(name: "shuffled")]
                for export in Self.exports {
                    let parts = export.name.split(separator: "/").map(String.init)
                    guard let pool = pools.first(where: { $0.name == parts[0] }) else { continue }
                    _ = try await manager.create(
                        pool, volume: parts[1], size: export.size, blockSize: export.minimumBlock)
                    _ = try await manager.map(
                        pool, volume: parts[1],
                        options: MapOptions(target: .export, readOnly: export.readOnly, configPath: "/fuzz"))
                }
            }
        } catch {
            fatalError("the server does not start: \(error)")
        }
        atexit { unlink(Server.shared.socketPath) }
    }

    /// After a client that left without a word: its session may still be there.
    func awaitNoClients() {
        waitFor { [manager] in
            while await manager.list().contains(where: { $0.connections > 0 }) { await Task.yield() }
        }
    }

    private static func export(_ name: String, block: UInt32, readOnly: Bool = false) -> Export {
        Export(name: name, description: "", size: size, readOnly: readOnly, minimumBlock: block)
    }
}

/// Runs asynchronous work to its end from this thread, which is no task's.
private func waitFor(_ work: @escaping @Sendable () async throws -> Void) {
    let done = Semaphore()
    Task.detached {
        do { try await work() } catch { fatalError("\(error)") }
        done.signal()
    }
    done.wait()
}
