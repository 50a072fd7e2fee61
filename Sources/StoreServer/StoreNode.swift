import Backend
import Configuration
import EventLoop
import Glibc
import Logging
import PureFlash
import Synchronization

/// A store: opens the volumes it is told to, and serves them on its data port. What waits for a disk runs aside.
actor StoreNode {
    /// Its own address, as in `store_ips`.
    nonisolated let address: String
    private let pools: [String: StorePool]
    private let durable: Bool
    private let faults: Faults?
    private let logger: Logger
    /// By id; read by the listener.
    private let prepared = Mutex<[UInt64: StoreVolume]>([:])
    private let turns = NameQueues()

    init(
        address: String, pools: [String: StorePool], durable: Bool, faults: Faults?,
        logger: Logger
    ) {
        self.address = address
        self.pools = pools
        self.durable = durable
        self.faults = faults
        self.logger = logger
    }

    /// From any thread.
    nonisolated func volume(_ id: UInt64) -> StoreVolume? { prepared.withLock { $0[id] } }

    func stop() async {
        let volumes = prepared.withLock { prepared in
            defer { prepared = [:] }
            return Array(prepared.values)
        }
        for volume in volumes { await volume.stop() }
    }

    /// A fault switch was turned.
    nonisolated func faultsChanged() {
        for volume in prepared.withLock({ Array($0.values) }) { volume.faultsChanged() }
    }

    // MARK: Orders

    /// Does what a conductor says; orders for one volume one after the other.
    func obey(_ order: VolumeOrder) async throws(RefusedRequest) {
        let key = "\(order.tenant)/\(order.volumeName)"
        try await turns.run(key) { () throws(RefusedRequest) in try await self.perform(order) }
    }

    /// Of a volume that is served here; of others it comes with prepare_volume.
    func setMetaVersion(_ version: UInt16, of id: UInt64) async { await volume(id)?.setMetaVersion(version) }

    private func perform(_ order: VolumeOrder) async throws(RefusedRequest) {
        guard let pool = pools[order.tenant] else {
            throw RefusedRequest(
                .invalidArgument,
                "the store \(address) has no tenant \(order.tenant); add a section [pool.\(order.tenant)] to its"
                    + " configuration")
        }
        try check(order)
        do throws(BackendError) {
            switch order.op {
            case "prepare_volume":
                try await prepare(order, pool)
                if let snapshot = order.snapshotName { try await prepare(snapshot, order, pool) }
            case "create_snapshot": try await createSnapshot(order, pool)
            case "delete_snapshot": try await deleteSnapshot(order, pool)
            case "create_volume":
                try await Aside.run { () throws(BackendError) in try Self.create(order, pool) }
                logger.info("created \(Self.name(order, pool)), \(order.volumeSize) bytes")
            case "withdraw_volume":
                guard try await Aside.run({ () throws(BackendError) in try Self.isMade(for: order, pool) }) else {
                    break
                }
                try await release(order, pool)
                try await Aside.run { () throws(BackendError) in try Self.delete(order, pool) }
            case "release_volume": try await release(order, pool)
            case "delete_volume":
                try await release(order, pool)
                try await Aside.run { () throws(BackendError) in try Self.delete(order, pool) }
            case "resize_volume": try await resize(order, pool)
            case "set_meta_ver": await served(order, pool)?.setMetaVersion(order.metaVer)
            default: throw BackendError(code: EINVAL, message: "a store has no operation \(order.op)")
            }
        } catch { throw RefusedRequest(error) }
    }

    /// It may come from anywhere, and its names become names of files.
    private func check(_ order: VolumeOrder) throws(RefusedRequest) {
        do throws(ConfigurationError) {
            try VolumeName.validate(component: order.volumeName, as: "volume_name")
            if let snapshot = order.snapshotName {
                try VolumeName.validate(component: snapshot, as: "snapshot_name")
            }
        } catch { throw RefusedRequest(.invalidArgument, "\(error)") }
        guard order.volumeSize > 0, order.volumeSize % UInt64(StoreProtocol.sector) == 0,
            order.volumeSize <= StoreProtocol.maximumVolume
        else { throw RefusedRequest(.invalidArgument, "volume_size is \(order.volumeSize)") }
    }

    private func layout(_ order: VolumeOrder) -> StoreLayout {
        var shards = [Bool](repeating: false, count: order.shards.count)
        for shard in order.shards where shards.indices.contains(shard.index) {
            shards[shard.index] = shard.replicas.contains { $0.repPorts == address }
        }
        return StoreLayout(
            id: order.volumeId, size: order.volumeSize, metaVersion: order.metaVer, shards: shards)
    }

    private static func name(_ order: VolumeOrder, _ pool: StorePool) -> String { "\(pool.name)/\(order.volumeName)" }

    /// The volume of an order; nil when it is not served, also when another one that is has its id.
    private func served(_ order: VolumeOrder, _ pool: StorePool) -> StoreVolume? {
        guard let volume = volume(order.volumeId), volume.name == Self.name(order, pool) else { return nil }
        return volume
    }

    private func prepare(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        if let volume = served(order, pool) {
            try check(volume.opened, has: order.volumeSize, pool)
            return await volume.update(layout(order))
        }
        if let other = volume(order.volumeId) { throw clash(order, pool, other) }
        let opened = try await Aside.run { () throws(BackendError) in
            try pool.volumes.open(volume: order.volumeName, readOnly: false)
        }
        let volume: StoreVolume
        do throws(BackendError) {
            try check(opened, has: order.volumeSize, pool)
            volume = try await StoreVolume.start(
                name: Self.name(order, pool), opened: opened, layout: layout(order), durable: durable,
                faults: faults, logger: logger)
        } catch {
            await Aside.always { opened.close() }
            throw error
        }
        let other = prepared.withLock { prepared in
            let other = prepared[order.volumeId]
            if other == nil { prepared[order.volumeId] = volume }
            return other
        }
        if let other {
            await volume.stop()
            throw clash(order, pool, other)
        }
        logger.info("serving \(volume.name)")
    }

    /// Clients name a volume by its id alone: of two with the same, one would get what is meant for the other.
    private func clash(_ order: VolumeOrder, _ pool: StorePool, _ other: StoreVolume) -> BackendError {
        let file = pool.path.map { "'id' in \($0)/\(order.volumeName).volume" } ?? "the id"
        return BackendError(
            code: EEXIST,
            message:
                "\(Self.name(order, pool)) has the id 0x\(String(order.volumeId, radix: 16)) of \(other.name), which"
                + " is served: one is a copy of the other's files; give the copy another multiple of 0x1000000 as \(file)"
        )
    }

    private func check(_ opened: any OpenVolume, has size: UInt64, _ pool: StorePool) throws(BackendError) {
        let record = opened.record
        guard record.size >= size else {
            throw BackendError(
                code: EIO,
                message:
                    "\(pool.name)/\(record.volume) has \(record.size) bytes at the store \(address), and \(size) for"
                    + " the conductor; resize it again")
        }
    }

    private func prepare(_ snapshot: String, _ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let volume = served(order, pool), let number = UInt32(exactly: order.snapSeq),
            await !volume.hasSnapshot(number)
        else { return }
        let opened = try await Aside.run { () throws(BackendError) in
            try pool.volumes.open(volume: "\(order.volumeName)@\(snapshot)", readOnly: true)
        }
        do throws(BackendError) { try await volume.add(opened, number: number) } catch {
            await Aside.always { opened.close() }
            throw error
        }
    }

    private func createSnapshot(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let snapshots = pool.volumes as? any SnapshotPool, let name = order.snapshotName else {
            throw BackendError(
                code: EOPNOTSUPP,
                message: "the volumes of tenant \(pool.name) have no snapshots; those of pools of type local do")
        }
        // It may be of any moment since it was begun, and the client wants this one.
        if order.replaces == true {
            let replaced = try await Aside.run { () throws(BackendError) in
                guard try snapshots.snapshots(volume: order.volumeName).contains(where: { $0.name == name }) else {
                    return false
                }
                try snapshots.deleteSnapshot(volume: order.volumeName, snapshot: name)
                return true
            }
            if replaced { logger.info("\(Self.name(order, pool))@\(name) was begun before and is made anew") }
        }
        guard let volume = served(order, pool) else {
            _ = try await Aside.run { () throws(BackendError) in
                try snapshots.createSnapshot(volume: order.volumeName, snapshot: name)
            }
            return
        }
        try await volume.change(.snapshot(name))
    }

    private func deleteSnapshot(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let snapshots = pool.volumes as? any SnapshotPool, let name = order.snapshotName else {
            throw BackendError(code: EOPNOTSUPP, message: "the volumes of tenant \(pool.name) have no snapshots")
        }
        let volume = served(order, pool)
        if let number = UInt32(exactly: order.snapSeq) { try await volume?.remove(number) }
        try await Aside.run { () throws(BackendError) in
            do throws(BackendError) { try snapshots.deleteSnapshot(volume: order.volumeName, snapshot: name) } catch {
                // An earlier try came as far as this.
                guard error.code == ENOENT else { throw error }
            }
        }
        let logger = logger
        let full = Self.name(order, pool)
        Task {
            do throws(BackendError) {
                for _ in 0..<Self.tidyingRounds {
                    let merged = try await volume?.tidy() ?? false
                    let outcome = try await Aside.run { () throws(BackendError) in try snapshots.tidy { false } }
                    guard merged || outcome.changed else { break }
                }
            } catch { logger.warning("what \(full)@\(name) has left is not merged yet: \(error)") }
        }
    }

    /// Of one deletion: a volume that is written to faster than its layers are merged is left for the next.
    private static let tidyingRounds = 6

    /// Closes a volume that no client is connected to.
    private func release(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let volume = served(order, pool) else { return }
        let count = await volume.connections()
        guard count == 0 else {
            throw BackendError(
                code: EBUSY,
                message: "\(volume.name) is in use: \(count) connections at the store \(address)")
        }
        prepared.withLock { $0[order.volumeId] = nil }
        await volume.stop()
    }

    /// For a conductor elsewhere, which keeps the catalogue.
    private static func create(_ order: VolumeOrder, _ pool: StorePool) throws(BackendError) {
        let record = try pool.volumes.create(
            volume: order.volumeName, size: order.volumeSize, blockSize: StoreProtocol.sector)
        do throws(BackendError) {
            var entry = try pool.entry(record)
            entry.origin = order.volumeId
            try pool.keep(entry, of: order.volumeName)
        } catch {
            try delete(order, pool)
            throw error
        }
    }

    /// Whether there is a volume that `create` has made for an order with this id, and no other one of its name.
    private static func isMade(for order: VolumeOrder, _ pool: StorePool) throws(BackendError) -> Bool {
        guard let record = try pool.find(order.volumeName) else { return false }
        return try pool.entry(record).origin == order.volumeId
    }

    private static func delete(_ order: VolumeOrder, _ pool: StorePool) throws(BackendError) {
        do throws(BackendError) { try pool.volumes.delete(volume: order.volumeName, snapshots: true) } catch {
            // An earlier try came as far as this.
            guard error.code == ENOENT else { throw error }
        }
        try pool.forget(order.volumeName)
    }

    private func resize(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let volume = served(order, pool) else {
            return try await Aside.run { () throws(BackendError) in
                if try pool.record(order.volumeName).size < order.volumeSize {
                    _ = try pool.volumes.grow(volume: order.volumeName, to: order.volumeSize)
                }
            }
        }
        let opened = volume.opened
        if opened.record.size < order.volumeSize {
            _ = try await Aside.run { () throws(BackendError) in try opened.grow(to: order.volumeSize) }
        }
        await volume.update(layout(order))
    }
}
