import Backend
import Glibc
import Logging

// Suspend, resume and limits, as an administrator asks for them; what was asked survives the daemon.
extension VolumeManager {
    /// Holds back the volume's I/O; returns when none is in flight at its store and that is written down.
    /// - Parameter timeout: seconds, 1...86400. ETIMEDOUT when it has passed, and the volume is as it was before.
    package func suspend(pool: String, volume: String, timeout: UInt64) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        guard (1...86_400).contains(timeout) else {
            throw BackendError(code: EINVAL, message: "a time-out of \(timeout) s: it can be 1 to 86400 seconds")
        }
        try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            let before = mapping.settings.gate
            guard before != .suspended else { return }
            if let device = mapping.device { await setResendInterval(device, mapping.volume, heldBack: true) }
            do throws(BackendError) {
                try await mapping.volume.suspend(timeout: timeout)
                do throws(BackendError) { try await keep(.suspended, of: mapping) } catch {
                    try await mapping.volume.resume(before)
                    throw error
                }
            } catch {
                if let device = mapping.device { await setResendInterval(device, mapping.volume, heldBack: false) }
                throw error
            }
            mapping.volume.logger.info("suspended: its I/O is held back, none is in flight")
        }
    }

    /// Lets the volume's I/O run again, or fail, or be discarded; also what was held back. From any state.
    /// - Parameter state: anything but `suspended`.
    package func resume(pool: String, volume: String, _ state: GateState) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        cancelSuspend(name)
        try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            guard mapping.settings.gate != state else { return }
            // Should the daemon end in between, the next one does what was asked.
            try await keep(state, of: mapping)
            try await mapping.volume.resume(state)
            if let device = mapping.device { await setResendInterval(device, mapping.volume, heldBack: false) }
            switch state {
            case .normal: mapping.volume.logger.info("resumed: its I/O runs")
            case .error: mapping.volume.logger.warning("resumed with errors: its I/O fails")
            case .discard: mapping.volume.logger.warning("resumed with loss: what is written is discarded")
            case .suspended: preconditionFailure("resuming into suspension")
            }
        }
    }

    /// Changes limits of the volume; they hold at once, also for what waits.
    /// - Parameter change: of the limits there are.
    /// - Returns: the limits there are then.
    package func setLimits(
        pool: String, volume: String, _ change: @escaping @Sendable (inout ThrottleLimits) -> Void
    ) async throws(BackendError) -> ThrottleLimits {
        let name = "\(pool)/\(volume)"
        return try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            var settings = mapping.settings
            change(&settings.limits)
            guard settings.limits != mapping.settings.limits else { return settings.limits }
            try Self.check(settings.limits)
            try await keep(settings, of: mapping)
            await mapping.volume.setLimits(settings.limits)
            mapping.volume.logger.info("limits: \(settings.limits)")
            return settings.limits
        }
    }

    static func check(_ limits: ThrottleLimits) throws(BackendError) {
        let range = ThrottleLimits.burstRange
        guard range.contains(limits.burst) else {
            throw BackendError(
                code: EINVAL,
                message: "a burst of \(limits.burst) ms: it can be \(range.lowerBound) to \(range.upperBound) ms")
        }
    }

    /// A suspend that still waits for the store gives up, and the volume goes on as before.
    func cancelSuspend(_ name: String) {
        mapping(name)?.volume.cancelSuspend(
            BackendError(code: ECANCELED, message: "\(name) is not suspended: something else was asked meanwhile"))
    }

    private func keep(_ state: GateState, of mapping: Mapping) async throws(BackendError) {
        var settings = mapping.settings
        settings.gate = state
        settings.gateSince = Int64(time(nil))
        try await keep(settings, of: mapping)
    }

    func keep(_ settings: VolumeSettings, of mapping: Mapping) async throws(BackendError) {
        try await remember(
            mapping.pool, mapping.options, settings, mapping.volume, mapping.deviceID, mapping.device?.identifier)
        state.withLock { $0.mappings[mapping.volume.name]?.settings = settings }
    }
}
