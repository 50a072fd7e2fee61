import Glibc
import Logging
import NBD
import Synchronization

/// The exports NBD clients find, by `pool/volume`. Read on the listener's loop, changed by the manager.
final class ExportRegistry: ExportHost, Sendable {
    private struct State {
        var volumes: [String: Volume] = [:]
        /// What the empty name leads to.
        var defaultName: String?
        var handshakes = 0
        var clientLeft: (@Sendable () -> Void)?
    }
    private let state = Mutex(State())
    private let logger: Logger

    init(logger: Logger) { self.logger = logger }

    func add(_ volume: Volume) { state.withLock { $0.volumes[volume.name] = volume } }
    func remove(_ name: String) { state.withLock { $0.volumes[name] = nil } }
    func setDefault(_ name: String) { state.withLock { $0.defaultName = name } }

    /// Clients in their handshake.
    var handshakes: Int { state.withLock { $0.handshakes } }

    /// - Parameter observer: called on the listener's loop whenever a client has begun or left its handshake.
    func observe(_ observer: @escaping @Sendable () -> Void) { state.withLock { $0.clientLeft = observer } }

    func handshakesChanged(_ count: Int) {
        let observer = state.withLock { state in
            state.handshakes = count
            return state.clientLeft
        }
        observer?()
    }

    private func volume(_ name: String) -> Volume? {
        state.withLock { state in state.volumes[name.isEmpty ? state.defaultName ?? "" : name] }
    }

    func export(named name: String) -> ExportLookup {
        volume(name).map { .found($0.export) } ?? .unknown
    }

    func exportNames() -> [String] { state.withLock { $0.volumes.keys.sorted() } }

    func attach(descriptor: Int32, peer: String, negotiated: Negotiated, leftover: [UInt8]) {
        guard let volume = volume(negotiated.export.name) else {
            // Unmapped since the handshake.
            Glibc.close(descriptor)
            return
        }
        volume.attach(descriptor: descriptor, peer: peer, negotiated: negotiated, leftover: leftover)
    }

    func listenerEvent(_ message: String) { logger.info("\(message)") }
}
