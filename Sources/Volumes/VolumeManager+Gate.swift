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
    /// - Returns: what is to be known of it: the next daemon would undo it. Nil for nothing.
    package func resume(pool: String, volume: String, _ state: GateState) async throws(BackendError) -> String? {
        let name = "\(pool)/\(volume)"
        cancelSuspend(name)
        return try await names.run(name) { [self] () throws(BackendError) -> String? in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            let before = mapping.settings.gate
            guard before != state || mapping.isUnsaved else { return nil }
            var warning: String?
            // Should the daemon end in between, the next one does what was asked.
            do throws(BackendError) { try await keep(state, of: mapping) } catch {
                // What is held back may be what would make room in that folder.
                guard state == .normal || before == .suspended || before == state else { throw error }
                note(unsaved: setting(state, of: mapping), name)
                let text =
                    "\(name) is resumed, but that is not written down (\(error.message)): until it is, a daemon that is"
                    + " started again does not know of it; repeat `qbd resume \(name) -t \(state.rawValue)` when the"
                    + " folder can be written"
                mapping.volume.logger.warning("\(text)")
                warning = text
            }
            guard before != state else { return warning }
            try await mapping.volume.resume(state)
            if let device = mapping.device { await setResendInterval(device, mapping.volume, heldBack: false) }
            switch state {
            case .normal: mapping.volume.logger.info("resumed: its I/O runs")
            case .error: mapping.volume.logger.warning("resumed with errors: its I/O fails")
            case .discard: mapping.volume.logger.warning("resumed with loss: what is written is discarded")
            case .suspended: preconditionFailure("resuming into suspension")
            }
            return warning
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
        try await keep(setting(state, of: mapping), of: mapping)
    }

    private func setting(_ state: GateState, of mapping: Mapping) -> VolumeSettings {
        var settings = mapping.settings
        guard settings.gate != state else { return settings }
        settings.gate = state
        settings.gateSince = Int64(time(nil))
        return settings
    }

    func keep(_ settings: VolumeSettings, of mapping: Mapping) async throws(BackendError) {
        try await remember(
            mapping.pool, mapping.options, settings, mapping.volume, mapping.deviceID, mapping.device?.identifier)
        state.withLock { state in
            state.mappings[mapping.volume.name]?.settings = settings
            state.mappings[mapping.volume.name]?.isUnsaved = false
        }
    }

    private func note(unsaved settings: VolumeSettings, _ name: String) {
        state.withLock { state in
            state.mappings[name]?.settings = settings
            state.mappings[name]?.isUnsaved = true
        }
    }

    /// The last chance for what could not be written when it was set.
    func keepUnsaved(_ mapping: Mapping) async {
        guard mapping.isUnsaved else { return }
        do throws(BackendError) { try await keep(mapping.settings, of: mapping) } catch {
            mapping.volume.logger.error(
                "that it is in the state \(mapping.settings.gate.rawValue) is not written down: \(error.message)")
        }
    }
}
