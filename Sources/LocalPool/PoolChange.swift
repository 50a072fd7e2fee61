import Backend
import CLinux
import EventLoop
import Glibc
import Synchronization

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

/// A change of an open volume, with the lock of its pool. What can wait, or takes time, is done when it is prepared; with
/// I/O held back, data is synchronised, and one rename makes the change.
///
/// Between the two, and when the change is given up, others use the volume: this has descriptors of its own for it, and
/// touches what they share only while `Hold` says that they do not.
final class PoolChange: PreparedChange, @unchecked Sendable {
    enum Plan {
        /// The same files, opened anew.
        case reopen
        /// What is the head becomes a layer that changes no more, and an empty one on top of it the head.
        case freeze(head: UInt64, Replacement)
        /// The head goes into the layer below, which becomes the head.
        /// - merged: what it is then; nil when the volume has its data under its own name again.
        case merge(into: Layer, merged: Layer?, Replacement)
    }

    /// The description that makes the change.
    struct Replacement {
        let description: VolumeDescription
        let draft: String
    }

    private let pool: LocalPool
    private let directory: Directory
    private let lock: Int32
    private let opened: StoredVolume
    private let plan: Plan
    /// What there was before anything was made for the change.
    private let before: LayerTree
    private let data: LayerFile
    private let map: LayerFile?
    private struct State {
        var isFinished = false
        var failure: BackendError?
    }
    /// Held while the change is made.
    private let state = Mutex(State())

    init(
        _ pool: LocalPool, _ directory: consuming Directory, lock: Int32, _ opened: StoredVolume, _ plan: Plan,
        before: LayerTree
    ) throws(BackendError) {
        self.pool = pool
        self.directory = directory
        self.lock = lock
        self.opened = opened
        self.plan = plan
        self.before = before
        switch opened {
        case .plain(let volume):
            data = try LayerFile(descriptor: volume.descriptor, path: volume.path).duplicate()
            map = nil
        case .layered(let volume):
            let data = try volume.headFile.duplicate()
            do throws(BackendError) { map = try volume.mapFile?.duplicate() } catch {
                Glibc.close(data.descriptor)
                throw error
            }
            self.data = data
        }
    }

    deinit {
        // The marker has the next look at the pool clear up what a change left that was never finished.
        if !state.withLock({ $0.isFinished }) { closeAll() }
    }

    /// The pool's lock last: who waits for it finds the volume's files as unlocked as they are going to be.
    private func closeAll() {
        Glibc.close(data.descriptor)
        if let map { Glibc.close(map.descriptor) }
        Glibc.close(lock)
    }

    // MARK: With I/O held back

    func apply(_ hold: Hold) throws(BackendError) -> any OpenVolume {
        try state.withLock { (state) throws(BackendError) in
            let replacement =
                switch plan {
                case .reopen: try reopen(hold)
                case .freeze(let head, let replacement):
                    try replace(hold, replacement, &state.failure) { () throws(BackendError) in
                        try synchronize(hold)
                        return try pool.openChain(directory, to: head, record: opened.record, readOnly: false)
                    }
                case .merge(let lower, let merged, let replacement):
                    try replace(hold, replacement, &state.failure) { () throws(BackendError) in
                        try merge(into: lower, as: merged, hold)
                    }
                }
            if case .layered(let volume) = opened { volume.isReplaced.store(true, ordering: .relaxed) }
            return replacement
        }
    }

    private func synchronize(_ hold: Hold) throws(BackendError) {
        switch opened {
        case .plain(let volume): try volume.synchronize(data)
        case .layered(let volume): if let map { try volume.writeMap(data, map, hold) }
        }
        try hold.check()
    }

    /// Makes an open volume the one that counts.
    private func replace(
        _ hold: Hold, _ replacement: Replacement, _ failure: inout BackendError?,
        _ open: () throws(BackendError) -> any OpenVolume
    ) throws(BackendError) -> any OpenVolume {
        let next = try open()
        do throws(BackendError) {
            try hold.commit()
            try pool.putInPlace(directory, replacement.draft, of: replacement.description)
        } catch {
            pool.release(next)
            throw error
        }
        do throws(BackendError) { try directory.synchronize() } catch {
            // It counts, and may not after a power cut: nothing more is promised to be durable.
            next.failFlushes()
            failure = error
        }
        return next
    }

    private func reopen(_ hold: Hold) throws(BackendError) -> any OpenVolume {
        let next: any OpenVolume
        switch opened {
        case .plain(let volume):
            let copy = try data.duplicate()
            let plain = LocalOpenVolume(
                pool: pool, record: volume.record, descriptor: copy.descriptor, readOnly: volume.readOnly)
            if volume.hasFailed.load(ordering: .relaxed) { plain.failFlushes() }
            next = plain
        case .layered(let volume):
            try synchronize(hold)
            // The lock on the head belongs to the open file, which both share.
            next = try pool.openChain(
                directory, to: volume.head.id, record: volume.record, readOnly: volume.readOnly,
                locked: try data.duplicate().descriptor)
        }
        do throws(BackendError) { try hold.commit() } catch {
            pool.release(next)
            throw error
        }
        return next
    }

    private func merge(
        into lower: Layer, as merged: Layer?, _ hold: Hold
    ) throws(BackendError) -> any OpenVolume {
        guard case .layered(let volume) = opened else { preconditionFailure("a plain volume has nothing to merge") }
        try synchronize(hold)
        let files = try pool.openBoth(directory, lower, volume.head)
        defer { files.close() }
        _ = try pool.copy(files) {
            do throws(BackendError) { try hold.check() } catch { return true }
            return false
        }
        try hold.check()
        guard let merged else { return try pool.openPlain(directory, volume.record, readOnly: false) }
        try pool.writeUnion(directory, merged, merged.mapFile, files)
        try directory.synchronize()
        try hold.check()
        return try pool.openChain(directory, to: merged.id, record: volume.record, readOnly: false)
    }

    // MARK: Afterwards

    func finish() throws(BackendError) {
        let failure: BackendError? = state.withLock { state in
            guard !state.isFinished else { return nil }
            state.isFinished = true
            switch plan {
            case .reopen: break
            case .freeze(_, let replacement), .merge(_, _, let replacement):
                pool.removeDraft(directory, replacement.draft)
                pool.clearUp(directory, after: before)
            }
            closeAll()
            return state.failure
        }
        if let failure { throw failure }
    }
}

extension LocalPool {
    /// Closes a volume that was opened and never used.
    func release(_ opened: any OpenVolume) {
        if let layered = opened as? LayeredOpenVolume { layered.release() } else { opened.close() }
    }

    /// Takes the pool's lock and makes what a change needs.
    func prepare(
        _ change: StoreChange, of opened: StoredVolume, giveUp: () -> BackendError?
    ) throws(BackendError) -> any PreparedChange {
        let directory = try openDirectory()
        let lock = try directory.lock(giveUp: giveUp)
        do throws(BackendError) { try recover(directory) } catch {
            Glibc.close(lock)
            throw error
        }
        return try prepare(change, of: opened, directory, lock)
    }

    /// - Parameter lock: the pool's; it is taken over, also on an error.
    private func prepare(
        _ change: StoreChange, of opened: StoredVolume, _ directory: consuming Directory, _ lock: Int32
    ) throws(BackendError) -> PoolChange {
        do throws(BackendError) {
            let before = try tree(directory)
            let plan: PoolChange.Plan
            do throws(BackendError) { plan = try self.plan(directory, change, of: opened, before) } catch {
                clearUp(directory, after: before)
                throw error
            }
            return try PoolChange(self, directory, lock: lock, opened, plan, before: before)
        } catch {
            Glibc.close(lock)
            throw error
        }
    }

    private func plan(
        _ directory: borrowing Directory, _ change: StoreChange, of opened: StoredVolume, _ tree: LayerTree
    ) throws(BackendError) -> PoolChange.Plan {
        switch change {
        case .nothing: return .reopen
        case .snapshot(let name): return try planFreeze(directory, opened, as: name)
        case .tidy:
            // One step for an open volume whose head stands alone on a layer that nobody else needs.
            guard case .layered(let volume) = opened, !volume.readOnly, let below = volume.head.parent,
                let lower = tree.layers[below], tree.onlyChild(of: below)?.id == volume.head.id
            else { return .reopen }
            guard try volume.headFile.used() <= Self.smallHead else {
                return try planFreeze(directory, opened, as: nil)
            }
            return try planMerge(directory, volume, into: lower)
        }
    }

    /// - Parameter snapshot: nil makes no snapshot of what is the head.
    private func planFreeze(
        _ directory: borrowing Directory, _ opened: StoredVolume, as snapshot: String?
    ) throws(BackendError) -> PoolChange.Plan {
        let record = opened.record
        var description = try describe(directory, record.volume)
        if let snapshot, description.snapshot(snapshot) != nil {
            throw BackendError(code: EEXIST, message: "\(name)/\(record.volume)@\(snapshot) exists already")
        }
        if case .layered(let volume) = opened { try checkDepth(directory, on: volume.head.id, record.volume) }
        let id = try snapshot == nil ? 0 : unusedID(directory)
        if let snapshot { try checkRoom(in: description, for: snapshot) }
        keepSpare(directory, for: description)
        try placeMarker(directory)
        let frozen = try frozenLayer(directory, opened)
        let head = try makeLayer(directory, on: frozen, size: record.size, owner: record.id, written: true)
        try directory.synchronize()
        description.head = head.id
        if let snapshot {
            let made = SnapshotRecord(id: id, name: snapshot, size: record.size, created: Int64(time(nil)))
            description.snapshots.append(.init(record: made, layer: frozen))
        }
        return .freeze(
            head: head.id, .init(description: description, draft: try draft(directory, description)))
    }

    /// The layer that the head of an open volume is to be. The data of one without snapshots gets a second name for that,
    /// and is as long as whole clusters from now on; `removeNeedless` takes both back when nothing comes of it.
    private func frozenLayer(
        _ directory: borrowing Directory, _ opened: StoredVolume
    ) throws(BackendError) -> UInt64 {
        switch opened {
        case .layered(let volume): return volume.head.id
        case .plain(let volume):
            let id = newLayerID()
            let layer = Layer(id: id, parent: nil, data: id, owner: volume.record.id)
            try directory.link(Self.data(volume.record.volume), to: layer.dataFile)
            try LayerFile(descriptor: volume.descriptor, path: volume.path).extend(to: Layer.padded(volume.record.size))
            try makeMap(directory, layer, size: volume.record.size)
            return id
        }
    }

    private func planMerge(
        _ directory: borrowing Directory, _ volume: LayeredOpenVolume, into lower: Layer
    ) throws(BackendError) -> PoolChange.Plan {
        var description = try describe(directory, volume.record.volume)
        try placeMarker(directory)
        guard lower.parent != nil || !description.snapshots.isEmpty else {
            // Down to one layer, it has its data under its own name again.
            let file = Self.data(volume.record.volume)
            do throws(BackendError) { try directory.link(lower.dataFile, to: file) } catch {
                guard error.code == EEXIST else { throw error }
                throw BackendError(
                    code: EEXIST, message: "\(path)/\(file) is in the way and belongs to no volume; move it away")
            }
            try directory.synchronize()
            let plain = VolumeDescription(description.record)
            return .merge(
                into: lower, merged: nil, .init(description: plain, draft: try draft(directory, plain)))
        }
        let merged = Layer(
            id: newLayerID(), parent: lower.parent, data: lower.data, owner: volume.record.id,
            state: .written(boot: try Boot.identifier()))
        description.head = merged.id
        return .merge(
            into: lower, merged: merged, .init(description: description, draft: try draft(directory, description)))
    }

    /// Changes a volume that nobody has open. EBUSY when somebody has. Its files are locked for no longer than the pool is,
    /// so that who wants to open it waits instead of failing.
    func change(_ volume: String, _ change: StoreChange) throws(BackendError) {
        let directory = try openDirectory()
        let lock = try directory.lock()
        let opened: any OpenVolume
        do throws(BackendError) {
            try recover(directory)
            opened = try open(directory, volume, readOnly: false)
        } catch {
            Glibc.close(lock)
            throw error
        }
        let stored: StoredVolume
        switch opened {
        case let layered as LayeredOpenVolume: stored = .layered(layered)
        case let plain as LocalOpenVolume: stored = .plain(plain)
        default: preconditionFailure("a local pool has two kinds of volumes")
        }
        let prepared: PoolChange
        do throws(BackendError) { prepared = try prepare(change, of: stored, directory, lock) } catch {
            opened.close()
            throw error
        }
        do throws(BackendError) { try prepared.apply(Hold()).close() } catch {
            opened.close()
            // It says nothing else than this error when nothing was changed.
            do throws(BackendError) { try prepared.finish() } catch {}
            throw error
        }
        opened.close()
        try prepared.finish()
    }
}
