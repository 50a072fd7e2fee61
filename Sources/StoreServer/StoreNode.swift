import Backend
import Configuration
import EventLoop
import Glibc
import Logging
import PureFlash
import Synchronization

/// A store: opens the volumes it is told to, and serves them on its data port. May block.
actor StoreNode {
    private let executor: ThreadExecutor
    nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    /// Its own address, as in `store_ips`.
    nonisolated let address: String
    private let pools: [String: StorePool]
    private let durable: Bool
    private let faults: Faults?
    private let logger: Logger
    /// By id; read by the listener.
    private let prepared = Mutex<[UInt64: StoreVolume]>([:])
    private var turns = Turns()

    init(
        executor: ThreadExecutor, address: String, pools: [String: StorePool], durable: Bool, faults: Faults?,
        logger: Logger
    ) {
        self.executor = executor
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
        let before = turns.before(key)
        let outcome = Answer<RefusedRequest?>()
        let task = Task {
            await before?.value
            do throws(RefusedRequest) {
                try await self.perform(order)
                outcome.set(nil)
            } catch { outcome.set(error) }
        }
        turns.set(key, task)
        await task.value
        turns.ended(key, task)
        if let refusal = outcome.take({ nil }) { throw refusal }
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
            case "create_volume":
                _ = try pool.volumes.create(
                    volume: order.volumeName, size: order.volumeSize, blockSize: StoreProtocol.sector)
            case "release_volume": try await release(order)
            case "delete_volume":
                try await release(order)
                try delete(order, pool)
            case "resize_volume": try await resize(order, pool)
            case "set_meta_ver": await setMetaVersion(order.metaVer, of: order.volumeId)
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

    private func prepare(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        if let volume = volume(order.volumeId) {
            try check(volume.opened, has: order.volumeSize, pool)
            return await volume.update(layout(order))
        }
        let opened = try pool.volumes.open(volume: order.volumeName, readOnly: false)
        do throws(BackendError) {
            try check(opened, has: order.volumeSize, pool)
            let volume = try await StoreVolume.start(
                name: "\(pool.name)/\(order.volumeName)", opened: opened, layout: layout(order), durable: durable,
                faults: faults, logger: logger)
            prepared.withLock { $0[order.volumeId] = volume }
            logger.info("serving \(volume.name)")
        } catch {
            opened.close()
            throw error
        }
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
        guard let volume = volume(order.volumeId), let number = UInt32(exactly: order.snapSeq),
            await !volume.hasSnapshot(number)
        else { return }
        let opened = try pool.volumes.open(volume: "\(order.volumeName)@\(snapshot)", readOnly: true)
        do throws(BackendError) { try await volume.add(opened, number: number) } catch {
            opened.close()
            throw error
        }
    }

    private func createSnapshot(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let snapshots = pool.volumes as? any SnapshotPool, let name = order.snapshotName else {
            throw BackendError(
                code: EOPNOTSUPP,
                message: "the volumes of tenant \(pool.name) have no snapshots; those of pools of type local do")
        }
        guard let volume = volume(order.volumeId) else {
            _ = try snapshots.createSnapshot(volume: order.volumeName, snapshot: name)
            return
        }
        try await volume.makeSnapshot(name)
    }

    /// Closes a volume that no client is connected to.
    private func release(_ order: VolumeOrder) async throws(BackendError) {
        guard let volume = volume(order.volumeId) else { return }
        let count = await volume.connections()
        guard count == 0 else {
            throw BackendError(
                code: EBUSY,
                message: "\(volume.name) is in use: \(count) connections at the store \(address)")
        }
        prepared.withLock { $0[order.volumeId] = nil }
        await volume.stop()
    }

    private func delete(_ order: VolumeOrder, _ pool: StorePool) throws(BackendError) {
        do throws(BackendError) { try pool.volumes.delete(volume: order.volumeName, snapshots: true) } catch {
            // An earlier try came as far as this.
            guard error.code == ENOENT else { throw error }
        }
    }

    private func resize(_ order: VolumeOrder, _ pool: StorePool) async throws(BackendError) {
        guard let volume = volume(order.volumeId) else {
            if try pool.record(order.volumeName).size < order.volumeSize {
                _ = try pool.volumes.grow(volume: order.volumeName, to: order.volumeSize)
            }
            return
        }
        if volume.opened.record.size < order.volumeSize { _ = try volume.opened.grow(to: order.volumeSize) }
        await volume.update(layout(order))
    }
}
