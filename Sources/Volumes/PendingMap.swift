import Backend
import Glibc
import Synchronization

/// A map that waits for its volume to become ready, which an unmap or the daemon's end gives up.
final class PendingMap: Sendable {
    private struct State {
        var isOpened = false
        /// Why it is given up.
        var reason: BackendError?
        /// Of the last try.
        var problem: BackendError?
    }

    /// Absolute path.
    let configPath: String
    private let state = Mutex(State())

    init(configPath: String) { self.configPath = configPath }

    /// What it is waiting for, once a try has failed.
    var problem: BackendError? { state.withLock { $0.problem } }

    /// Nil while it is not given up.
    var reason: BackendError? { state.withLock { $0.reason } }

    func note(_ problem: BackendError) { state.withLock { $0.problem = problem } }

    /// Gives it up unless its volume is open; then it is all but done.
    /// - Returns: whether that is so.
    func giveUp(_ reason: BackendError) -> Bool {
        state.withLock { state in
            guard !state.isOpened else { return false }
            state.reason = state.reason ?? reason
            return true
        }
    }

    /// Its volume is open; from here on it is not given up.
    /// - Throws: why it was given up before.
    func opened() throws(BackendError) {
        let reason = state.withLock { state in
            if state.reason == nil { state.isOpened = true }
            return state.reason
        }
        if let reason { throw reason }
    }
}

extension VolumeManager {
    /// Gives up every map that waits: the daemon is stopping.
    package func giveUpMaps() {
        for (name, pending) in state.withLock({ $0.pending }) {
            let reason = BackendError(code: ESHUTDOWN, message: "\(name) is not mapped: qbdd is stopping")
            for map in pending { _ = map.giveUp(reason) }
        }
    }

    /// Gives up the maps of a volume that wait, and those behind them.
    /// - Returns: whether there was one.
    func giveUpMaps(of name: String) -> Bool {
        let reason = BackendError(code: ECANCELED, message: "\(name) was unmapped before it was ready")
        return state.withLock { $0.pending[name] ?? [] }.map { $0.giveUp(reason) }.contains(true)
    }

    func add(_ map: PendingMap, _ name: String) { state.withLock { $0.pending[name, default: []].append(map) } }

    func remove(_ map: PendingMap, _ name: String) {
        state.withLock { state in
            state.pending[name]?.removeAll { $0 === map }
            if state.pending[name]?.isEmpty ?? false { state.pending[name] = nil }
        }
    }
}
