import Backend
import Glibc
import Logging

extension VolumeManager {
    private static func snapshots(of pool: any VolumePool) throws(BackendError) -> any SnapshotPool {
        if let pool = pool as? any SnapshotPool { return pool }
        throw BackendError(
            code: EOPNOTSUPP,
            message:
                "the volumes of pool \(pool.name) have no snapshots; those of pools of type local and of clusters do")
    }

    /// Of a mapped volume, what was acknowledged before is in it; its clients see a pause.
    package func createSnapshot(
        _ pool: any VolumePool, volume: String, snapshot: String
    ) async throws(BackendError) -> SnapshotRecord {
        let snapshots = try Self.snapshots(of: pool)
        let name = "\(pool.name)/\(volume)"
        let made = try await names.run(name) { [self] () throws(BackendError) in
            let mapping = mapping(name).flatMap { $0.options.readOnly ? nil : $0 }
            try await Aside.run { () throws(BackendError) in try snapshots.expectSnapshot(volume: volume) }
            guard snapshots.openVolumesMakeSnapshots, let mapping, mapping.pool === pool else {
                let make = { @Sendable () throws(BackendError) in
                    try snapshots.createSnapshot(volume: volume, snapshot: snapshot)
                }
                guard !snapshots.openVolumesMakeSnapshots, let mapping else { return try await Aside.run(make) }
                return try await mapping.volume.whileHeldBack(make)
            }
            try await mapping.volume.exchangeStore(.snapshot(snapshot), on: blocking)
            let all = try await Aside.run { () throws(BackendError) in
                try snapshots.snapshots(volume: volume)
            }
            guard let made = all.first(where: { $0.name == snapshot }) else {
                throw BackendError(code: ENOENT, message: "\(name)@\(snapshot) is gone as soon as it was made")
            }
            return made
        }
        logger.info("snapshot made", metadata: ["volume": "\(name)@\(snapshot)"])
        return made
    }

    package func snapshots(_ pool: any VolumePool, volume: String) async throws(BackendError) -> [SnapshotRecord] {
        let snapshots = try Self.snapshots(of: pool)
        return try await Aside.run { () throws(BackendError) in try snapshots.snapshots(volume: volume) }
    }

    /// What only the snapshot needed is freed in the background.
    package func deleteSnapshot(
        _ pool: any VolumePool, volume: String, snapshot: String
    ) async throws(BackendError) {
        let snapshots = try Self.snapshots(of: pool)
        let name = "\(pool.name)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            guard snapshots.openVolumesMakeSnapshots || mapping("\(name)@\(snapshot)") == nil else {
                throw BackendError(code: EBUSY, message: "\(name)@\(snapshot) is mapped; unmap it first")
            }
            try await Aside.run { () throws(BackendError) in
                try snapshots.deleteSnapshot(volume: volume, snapshot: snapshot)
            }
        }
        logger.info("snapshot deleted", metadata: ["volume": "\(name)@\(snapshot)"])
        tidy(pool)
    }

    package func rollback(_ pool: any VolumePool, volume: String, snapshot: String) async throws(BackendError) {
        let snapshots = try Self.snapshots(of: pool)
        let name = "\(pool.name)/\(volume)"
        try await changeUnmapped(pool, name) { () throws(BackendError) in
            try snapshots.rollback(volume: volume, snapshot: snapshot)
        }
        logger.info("rolled back", metadata: ["volume": "\(name)@\(snapshot)"])
        tidy(pool)
    }

    /// - Parameter new: a volume that is not there yet, of the same pool.
    package func clone(
        _ pool: any VolumePool, volume: String, snapshot: String, to new: String
    ) async throws(BackendError) -> VolumeRecord {
        let snapshots = try Self.snapshots(of: pool)
        let record = try await names.run("\(pool.name)/\(new)") { [self] () throws(BackendError) in
            try refuseLeftover("\(pool.name)/\(new)")
            return try await Aside.run { () throws(BackendError) in
                try snapshots.clone(volume: volume, snapshot: snapshot, to: new)
            }
        }
        logger.info("cloned from \(volume)@\(snapshot)", metadata: ["volume": "\(pool.name)/\(new)"])
        return record
    }

    // MARK: Tidying

    /// Rounds of one task: a volume that is written to faster than its layers are merged is left for the next time.
    private static let tidyingRounds = 6

    /// Seconds after which a pool is looked at again in which something is left to be done.
    private static let tidyingPause: UInt64 = 300

    /// Merges in the background what deleted snapshots have left, also what an earlier daemon began.
    package func tidy(_ pool: any VolumePool) {
        guard let pool = pool as? any SnapshotPool else { return }
        let id = ObjectIdentifier(pool)
        let isRunning = state.withLock { state in
            defer { state.tidying[id] = state.tidying[id] != nil }
            return state.tidying[id] != nil
        }
        guard !isRunning else { return }
        Task { [weak pool] in
            var problem: String?
            var isLeft = false
            repeat {
                guard let pool else { return }
                do throws(BackendError) { isLeft = try await tidyNow(pool) } catch {
                    isLeft = true
                    if problem != error.message {
                        logger.error(
                            "layers of deleted snapshots are not merged, tried again: \(error.message)",
                            metadata: ["pool": "\(pool.name)"])
                    }
                    problem = error.message
                }
            } while await tidyAgain(id, isLeft: isLeft)
        }
    }

    /// Whether there is something to be done, at once or after a pause.
    private func tidyAgain(_ id: ObjectIdentifier, isLeft: Bool) async -> Bool {
        let pauses = isLeft ? Self.tidyingPause : 0
        for _ in 0...pauses {
            let again = state.withLock { state -> Bool? in
                let asked = state.tidying[id] == true
                guard !state.stopping, asked || isLeft else {
                    state.tidying[id] = nil
                    return false
                }
                if asked { state.tidying[id] = false }
                return asked ? true : nil
            }
            if let again { return again }
            await wait(nanoseconds: 1_000_000_000)
        }
        return true
    }

    /// - Returns: whether something is left that only time helps.
    private func tidyNow(_ pool: any SnapshotPool) async throws(BackendError) -> Bool {
        for _ in 0..<Self.tidyingRounds {
            var outcome = try await copying.run { [self] () throws(BackendError) in
                try pool.tidy { state.withLock { $0.stopping } }
            }
            for name in state.withLock({ state in state.mappings.filter { $0.value.pool === pool }.keys.sorted() }) {
                let done = try await names.run(name) { [self] () throws(BackendError) in try await tidyMapped(name) }
                outcome.changed = done || outcome.changed
            }
            if state.withLock({ $0.stopping }) { return false }
            if !outcome.changed { return outcome.isLeft }
        }
        return true
    }

    /// - Returns: whether there was something to do.
    private func tidyMapped(_ name: String) async throws(BackendError) -> Bool {
        guard let volume = mapping(name)?.volume, !state.withLock({ $0.stopping }) else { return false }
        let opened = volume.opened
        let due = try await Aside.run { () throws(BackendError) in try opened.dueChange() }
        guard let change = due else { return false }
        try await volume.exchangeStore(change, on: blocking)
        return true
    }
}
