import Backend
import CLinux
import EventLoop
import Glibc

/// An open volume of a local pool, of either kind.
enum StoredVolume {
    case plain(LocalOpenVolume)
    case layered(LayeredOpenVolume)

    var record: VolumeRecord {
        switch self {
        case .plain(let volume): volume.record
        case .layered(let volume): volume.record
        }
    }
}

extension LocalPool: SnapshotPool {
    package func createSnapshot(volume: String, snapshot: String) throws(BackendError) -> SnapshotRecord {
        let opened = try open(volume: volume, readOnly: false)
        defer { opened.close() }
        try opened.reopen(after: .snapshot(snapshot)).close()
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
        Glibc.close(try lockLayer(directory, found.layer, of: "\(volume)@\(snapshot)"))
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
            description.head = try makeLayer(directory, on: found.layer, size: found.record.size).id
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
            clone.head = try makeLayer(directory, on: found.layer, size: record.size).id
            try directory.synchronize()
            try replaceDescription(directory, clone)
        }
        return record
    }

    // MARK: Open volumes

    func dueChange(_ opened: LayeredOpenVolume) -> StoreChange? {
        do throws(BackendError) {
            let tree = try self.tree(try openDirectory())
            if !opened.readOnly, let below = opened.head.parent, tree.onlyChild(of: below)?.id == opened.head.id {
                return .tidy
            }
            let isCurrent = opened.layers.allSatisfy { layer in
                tree.layers[layer.id].map { $0.parent == layer.parent && $0.data == layer.data } ?? false
            }
            return isCurrent ? nil : .nothing
        } catch { return nil }
    }

    func reopen(_ opened: StoredVolume, after change: StoreChange) throws(BackendError) -> any OpenVolume {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        return try reopen(directory, opened, after: change)
    }

    /// Called under the pool's lock.
    func reopen(
        _ directory: borrowing Directory, _ opened: StoredVolume, after change: StoreChange
    ) throws(BackendError) -> any OpenVolume {
        let replacement: any OpenVolume
        switch change {
        case .nothing: replacement = try reopenUnchanged(directory, opened)
        case .snapshot(let name): replacement = try freeze(directory, opened, as: name)
        case .tidy: replacement = try tidyHead(directory, opened)
        }
        if case .layered(let volume) = opened { volume.isReplaced.store(true, ordering: .relaxed) }
        return replacement
    }

    private func reopenUnchanged(
        _ directory: borrowing Directory, _ opened: StoredVolume
    ) throws(BackendError) -> any OpenVolume {
        switch opened {
        case .plain(let volume):
            return LocalOpenVolume(
                pool: self, record: volume.record, descriptor: try duplicate(volume.descriptor),
                readOnly: volume.readOnly)
        case .layered(let volume):
            try volume.writeMap()
            // The lock on the head belongs to the open file, which both share.
            return try openChain(
                directory, to: volume.head.id, record: volume.record, readOnly: volume.readOnly,
                locked: try duplicate(volume.headFile.descriptor))
        }
    }

    private func duplicate(_ descriptor: Int32) throws(BackendError) -> Int32 {
        let copy = qbd_duplicate(descriptor)
        guard copy >= 0 else { throw BackendError(code: errno, message: "duplicate a descriptor: \(errnoText(errno))") }
        return copy
    }

    /// What is the head becomes a layer that changes no more, and an empty one on top of it the head.
    /// - Parameter snapshot: nil makes no snapshot of it.
    func freeze(
        _ directory: borrowing Directory, _ opened: StoredVolume, as snapshot: String?
    ) throws(BackendError) -> any OpenVolume {
        let record = opened.record
        let description = try describe(directory, record.volume)
        if let snapshot, description.snapshot(snapshot) != nil {
            throw BackendError(code: EEXIST, message: "\(name)/\(record.volume)@\(snapshot) exists already")
        }
        if case .layered(let volume) = opened { try checkDepth(directory, on: volume.head.id, record.volume) }
        let id = try snapshot == nil ? 0 : unusedID(directory)
        if let snapshot { try checkRoom(in: description, for: snapshot) }
        return try changing(directory) { (directory) throws(BackendError) in
            let frozen = try frozenLayer(directory, opened)
            do throws(BackendError) {
                let head = try makeLayer(directory, on: frozen, size: record.size)
                try directory.synchronize()
                var changed = description
                changed.head = head.id
                if let snapshot {
                    changed.snapshots.append(
                        .init(
                            record: SnapshotRecord(
                                id: id, name: snapshot, size: record.size, created: Int64(time(nil))),
                            layer: frozen))
                }
                let replacement = try openChain(directory, to: head.id, record: record, readOnly: false)
                try commit(directory, changed, replacement)
                return replacement
            } catch {
                // It goes on being the head.
                if case .layered(let volume) = opened { try volume.writeHeader(isComplete: false) }
                throw error
            }
        }
    }

    /// Writes the description that makes an open volume the one that counts.
    func commit(
        _ directory: borrowing Directory, _ description: VolumeDescription, _ opened: LayeredOpenVolume
    ) throws(BackendError) {
        do throws(BackendError) { try replaceDescription(directory, description) } catch {
            if let found = try? describe(directory, description.record.volume), found.head == description.head {
                // It counts, and may not after a power cut: nothing more is promised to be durable.
                opened.hasFailed.store(true, ordering: .relaxed)
                return
            }
            opened.release()
            throw error
        }
    }

    /// The head's data and map, complete and on stable storage.
    private func frozenLayer(_ directory: borrowing Directory, _ opened: StoredVolume) throws(BackendError) -> UInt64 {
        switch opened {
        case .layered(let volume):
            try volume.writeMap()
            try volume.writeHeader(isComplete: true)
            return volume.head.id
        case .plain(let volume):
            try volume.synchronize()
            let id = newLayerID()
            let layer = Layer(id: id, parent: nil, data: id, isComplete: true)
            let data = LayerFile(descriptor: volume.descriptor, path: "\(path)/\(layer.dataFile)")
            try directory.link(Self.data(volume.record.volume), to: layer.dataFile)
            try data.extend(to: Layer.padded(volume.record.size))
            try data.synchronize()
            try makeMap(directory, layer, size: volume.record.size)
            return id
        }
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

    private func checkDepth(
        _ directory: borrowing Directory, on layer: UInt64, _ volume: String
    ) throws(BackendError) {
        guard try chain(directory, to: layer).count >= Layer.maximumDepth else { return }
        throw BackendError(
            code: EMLINK,
            message: "\(name)/\(volume) has \(Layer.maximumDepth) layers below it already; delete some of its snapshots"
        )
    }

    /// A description that could not be read again would cost the volume.
    private func checkRoom(in description: VolumeDescription, for snapshot: String) throws(BackendError) {
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
