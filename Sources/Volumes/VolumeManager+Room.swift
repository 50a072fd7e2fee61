import Backend
import Logging

/// What is known of the room in a pool.
struct PoolWatch: Sendable {
    /// As it was lately; nil where it is not known.
    var space: PoolSpace?
    /// A look that takes long is not joined by another.
    var isLookedAt = false
    /// What the log has said last.
    var isNearlyFull = false
    var isUnknown = false
}

// Pools that fill up: said before writes fail.
extension VolumeManager {
    /// Nanoseconds between two looks.
    private static let roomInterval: UInt64 = 30_000_000_000

    func room(of pool: any VolumePool) -> PoolSpace? { state.withLock { $0.rooms[ObjectIdentifier(pool)]?.space } }

    /// Looks at once, and from time to time while it has mappings.
    func watchRoom(of pool: any VolumePool) {
        Task { await lookForRoom(pool) }
        let isFirst = state.withLock { state in
            defer { state.roomsAreWatched = true }
            return !state.roomsAreWatched
        }
        guard isFirst else { return }
        Task { [weak self] in
            while true {
                await self?.wait(nanoseconds: Self.roomInterval)
                guard let self, !isStopping else { return }
                for pool in poolsOfMappings() { Task { await self.lookForRoom(pool) } }
            }
        }
    }

    /// Each once; what is known of others is forgotten.
    private func poolsOfMappings() -> [any VolumePool] {
        state.withLock { state in
            var pools: [ObjectIdentifier: any VolumePool] = [:]
            for mapping in state.mappings.values { pools[ObjectIdentifier(mapping.pool)] = mapping.pool }
            state.rooms = state.rooms.filter { pools[$0.key] != nil || $0.value.isLookedAt }
            return Array(pools.values)
        }
    }

    private func lookForRoom(_ pool: any VolumePool) async {
        let key = ObjectIdentifier(pool)
        let mayLook = state.withLock { state in
            if state.rooms[key, default: PoolWatch()].isLookedAt { return false }
            state.rooms[key, default: PoolWatch()].isLookedAt = true
            return true
        }
        guard mayLook else { return }
        var space: PoolSpace?
        var problem: BackendError?
        do throws(BackendError) {
            space = try await Aside.run { () throws(BackendError) in try pool.space() }
        } catch { problem = error }
        let before = state.withLock { state in
            let before = state.rooms[key] ?? PoolWatch()
            let isNearlyFull = space?.isNearlyFull ?? before.isNearlyFull
            state.rooms[key] = PoolWatch(space: space, isNearlyFull: isNearlyFull, isUnknown: problem != nil)
            return before
        }
        if let problem, !before.isUnknown {
            logger.warning("how much room the pool \(pool.name) has is not known: \(problem.message)")
        }
        guard let space, space.isNearlyFull != before.isNearlyFull else { return }
        if space.isNearlyFull {
            logger.warning(
                """
                the pool \(pool.name) is nearly full: \(space.free >> 20) of \(space.total >> 20) MiB are free; writes to \
                its volumes fail when none are
                """)
        } else {
            logger.notice(
                "the pool \(pool.name) has room again: \(space.free >> 20) of \(space.total >> 20) MiB are free")
        }
    }
}
