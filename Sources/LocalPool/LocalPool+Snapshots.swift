import Backend
import CLinux
import EventLoop
import Glibc

extension LocalPool: SnapshotPool {
    package func createSnapshot(volume: String, snapshot: String) throws(BackendError) -> SnapshotRecord {
        try change(volume, .snapshot(snapshot))
        guard let made = try snapshots(volume: volume).first(where: { $0.name == snapshot }) else {
            throw BackendError(
                code: ENOENT, message: "\(name)/\(volume)@\(snapshot) was deleted as soon as it was there")
        }
        return made
    }

    package func snapshots(volume: String) throws(BackendError) -> [SnapshotRecord] {
        try describe(try openDirectory(), volume).snapshots.map(\.record)
    }

    package func deleteSnapshot(volume: String, snapshot: String) throws(BackendError) {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        var description = try describe(directory, volume)
        let found = try find(snapshot, in: description)
        let snapshotLock = try lockLayer(directory, found.layer, of: "\(volume)@\(snapshot)")
        defer { Glibc.close(snapshotLock) }
        description.snapshots.removeAll { $0.record.name == snapshot }
        let changed = description
        try changing(directory) { (directory) throws(BackendError) in try replaceDescription(directory, changed) }
    }

    package func rollback(volume: String, snapshot: String) throws(BackendError) {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        var description = try describe(directory, volume)
        let found = try find(snapshot, in: description)
        guard let head = description.head else { throw damaged(description, "it has snapshots and no head") }
        let headLock = try lockLayer(directory, head, of: volume)
        defer { Glibc.close(headLock) }
        description.record = description.record.resized(to: found.record.size)
        let old = description
        try changing(directory) { (directory) throws(BackendError) in
            var description = old
            description.head = try makeLayer(
                directory, on: found.layer, size: found.record.size, owner: old.record.id
            ).id
            try directory.synchronize()
            try replaceDescription(directory, description)
        }
    }

    package func clone(volume: String, snapshot: String, to new: String) throws(BackendError) -> VolumeRecord {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        let description = try describe(directory, volume)
        let found = try find(snapshot, in: description)
        try checkFree(directory, new)
        try checkDepth(directory, on: found.layer, volume)
        let record = VolumeRecord(
            id: try unusedID(directory), volume: new, size: found.record.size,
            blockSize: description.record.blockSize, created: Int64(time(nil)))
        try changing(directory) { (directory) throws(BackendError) in
            var clone = VolumeDescription(record)
            clone.head = try makeLayer(directory, on: found.layer, size: record.size, owner: record.id).id
            try directory.synchronize()
            try placeDescription(directory, clone)
        }
        return record
    }

    // MARK: Open volumes

    func dueChange(_ opened: LayeredOpenVolume) throws(BackendError) -> StoreChange? {
        let tree = try self.tree(try openDirectory())
        if !opened.readOnly, let below = opened.head.parent, tree.onlyChild(of: below)?.id == opened.head.id {
            return .tidy
        }
        let isCurrent = opened.layers.allSatisfy { layer in
            tree.layers[layer.id].map { $0.parent == layer.parent && $0.data == layer.data } ?? false
        }
        return isCurrent ? nil : .nothing
    }

    // MARK: Pieces

    func openSnapshot(
        _ directory: borrowing Directory, _ volume: String, _ snapshot: String
    ) throws(BackendError) -> any OpenVolume {
        let description = try describe(directory, volume)
        let found = try find(snapshot, in: description)
        let record = VolumeRecord(
            id: found.record.id, volume: "\(volume)@\(snapshot)", size: found.record.size,
            blockSize: description.record.blockSize, created: found.record.created)
        return try openChain(directory, to: found.layer, record: record, readOnly: true)
    }

    private func find(
        _ snapshot: String, in description: VolumeDescription
    ) throws(BackendError) -> VolumeDescription.LocalSnapshot {
        if let found = description.snapshot(snapshot) { return found }
        let volume = "\(name)/\(description.record.volume)"
        throw BackendError(
            code: ENOENT,
            message: "no snapshot \(volume)@\(snapshot); `qbd snapshot list \(volume)` lists what there is")
    }

    /// Opens and locks a layer's data, so that nobody has it open.
    func lockLayer(
        _ directory: borrowing Directory, _ id: UInt64, of volume: String
    ) throws(BackendError) -> Int32 {
        let layer = try layer(directory, id)
        let descriptor = try directory.open(layer.dataFile, O_RDONLY)
        do throws(BackendError) {
            let file = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)")
            if try file.lock(LOCK_EX) { return descriptor }
            throw BackendError(code: EBUSY, message: "\(name)/\(volume) is in use; unmap it first")
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    func checkDepth(
        _ directory: borrowing Directory, on layer: UInt64, _ volume: String
    ) throws(BackendError) {
        guard try chain(directory, to: layer).count >= Layer.maximumDepth else { return }
        throw BackendError(
            code: EMLINK,
            message: "\(name)/\(volume) has \(Layer.maximumDepth) layers below it already; delete some of its snapshots"
        )
    }

    /// A description that could not be read again would cost the volume.
    func checkRoom(in description: VolumeDescription, for snapshot: String) throws(BackendError) {
        // What else stands in a snapshot's line takes less.
        guard description.encode().utf8.count + snapshot.utf8.count + 128 > Directory.maximumFile else { return }
        throw BackendError(
            code: EMLINK,
            message:
                "\(name)/\(description.record.volume) has \(description.snapshots.count) snapshots, and its description"
                + " has room for no other; delete some of them")
    }

    private func damaged(_ description: VolumeDescription, _ what: String) -> BackendError {
        BackendError(code: EIO, message: "\(path)/\(Self.description(description.record.volume)) is damaged: \(what)")
    }
}
