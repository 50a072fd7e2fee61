import Backend
import CLinux
import EventLoop
import Glibc

// A layer that is neither a head nor a snapshot, and that a single layer stands on, is merged with that one: what the
// upper layer has is copied into the lower one's data, where nobody reads it but through the upper layer, which says the
// same there; then one rename makes the lower one's data the upper layer's. An interrupted merge is begun again.
//
// Where the upper layer is a head, it is merged while I/O is held back if it is small. Otherwise it is frozen first, and
// merged while an empty head takes what is written.
extension LocalPool {
    /// Bytes of a head that may be copied while I/O is held back.
    private static let smallHead: UInt64 = 32 << 20

    package func tidy(stop: () -> Bool) throws(BackendError) -> Bool {
        // A pool that nobody has used yet is left unmade.
        guard access(path, F_OK) == 0 else { return false }
        var changed = false
        /// Somebody else works on them, or has them open.
        var busy: Set<UInt64> = []
        while !stop() {
            guard let lower = try nextToMerge(except: busy) else { break }
            if try merge(lower, stop) { changed = true } else { busy.insert(lower) }
        }
        return changed
    }

    private func nextToMerge(except busy: Set<UInt64>) throws(BackendError) -> UInt64? {
        let tree = try self.tree(try openDirectory())
        return tree.layers.keys.filter { !busy.contains($0) && tree.onlyChild(of: $0) != nil }.min()
    }

    /// - Returns: whether something was done.
    private func merge(_ id: UInt64, _ stop: () -> Bool) throws(BackendError) -> Bool {
        let directory = try openDirectory()
        var lock = try directory.lock()
        defer { if lock >= 0 { Glibc.close(lock) } }
        let tree = try self.tree(directory)
        guard let lower = tree.layers[id], let upper = tree.onlyChild(of: id) else { return true }
        if let volume = tree.volumes.first(where: { $0.head == upper.id }) {
            return try mergeClosedHead(directory, volume.record)
        }
        let files = try openBoth(directory, lower, upper)
        defer { files.close() }
        // Held against another daemon's merge.
        guard try files.lower.lock(LOCK_EX) else { return false }
        Glibc.close(lock)
        lock = -1
        guard try copy(files, stop) else { return false }
        lock = try directory.lock()
        let now = try self.tree(directory)
        guard now.onlyChild(of: id) == upper, now.layers[id] == lower, !now.isHead(upper.id) else { return true }
        try placeMarker(directory)
        var merged = upper
        merged.parent = lower.parent
        merged.data = lower.data
        let draft = Self.ours + upper.mapFile
        try directory.remove(draft)
        try writeUnion(directory, merged, draft, files)
        try directory.rename(draft, to: upper.mapFile)
        try directory.synchronize()
        try removeUnreferenced(directory)
        return true
    }

    private func mergeClosedHead(
        _ directory: borrowing Directory, _ record: VolumeRecord
    ) throws(BackendError) -> Bool {
        let opened: any OpenVolume
        do throws(BackendError) { opened = try open(directory, record.volume, readOnly: false) } catch {
            guard error.code == EBUSY else { throw error }
            return false
        }
        defer { opened.close() }
        guard let layered = opened as? LayeredOpenVolume else { return true }
        try reopen(directory, .layered(layered), after: .tidy).close()
        return true
    }

    /// One step for an open volume whose head stands alone on a layer that nobody else needs.
    func tidyHead(_ directory: borrowing Directory, _ opened: StoredVolume) throws(BackendError) -> any OpenVolume {
        guard case .layered(let volume) = opened, !volume.readOnly else {
            return try reopen(directory, opened, after: .nothing)
        }
        let tree = try self.tree(directory)
        guard let below = volume.head.parent, let lower = tree.layers[below],
            tree.onlyChild(of: below)?.id == volume.head.id
        else { return try reopen(directory, opened, after: .nothing) }
        try volume.writeMap()
        guard try volume.headFile.used() <= Self.smallHead else { return try freeze(directory, opened, as: nil) }
        return try changing(directory) { (directory) throws(BackendError) in
            try mergeHead(directory, volume, into: lower)
        }
    }

    private func mergeHead(
        _ directory: borrowing Directory, _ volume: LayeredOpenVolume, into lower: Layer
    ) throws(BackendError) -> any OpenVolume {
        let files = try openBoth(directory, lower, volume.head)
        defer { files.close() }
        _ = try copy(files) { false }
        let record = volume.record
        var description = try describe(directory, record.volume)
        guard lower.parent != nil || !description.snapshots.isEmpty else {
            return try makePlain(directory, record, lower, files.lower)
        }
        let id = newLayerID()
        let merged = Layer(id: id, parent: lower.parent, data: lower.data, isComplete: true)
        try writeUnion(directory, merged, merged.mapFile, files)
        try directory.synchronize()
        let replacement = try openChain(directory, to: id, record: record, readOnly: false)
        description.head = id
        try commit(directory, description, replacement)
        return replacement
    }

    /// A volume whose layers are down to one has its data under its own name again.
    private func makePlain(
        _ directory: borrowing Directory, _ record: VolumeRecord, _ layer: Layer, _ data: LayerFile
    ) throws(BackendError) -> any OpenVolume {
        let file = Self.data(record.volume)
        guard try !directory.exists(file) else {
            throw BackendError(
                code: EEXIST, message: "\(path)/\(file) is in the way and belongs to no volume; move it away")
        }
        try directory.link(layer.dataFile, to: file)
        try directory.synchronize()
        let plain = try openPlain(directory, record, readOnly: false)
        do throws(BackendError) { try replaceDescription(directory, VolumeDescription(record)) } catch {
            guard let found = try? describe(directory, record.volume), found.head == nil else {
                plain.close()
                try directory.remove(file)
                throw error
            }
        }
        // To the byte, so that a file that is longer was made so by somebody. Padding does no harm otherwise.
        ftruncate(plain.descriptor, off_t(record.size))
        return plain
    }

    // MARK: Copying

    private struct Pair {
        let lower: LayerFile
        let upper: LayerFile
        /// Nil for the first layer of a chain, which has everything.
        let lowerMap: LayerFile?
        let upperMap: LayerFile
        let clusters: Int

        func close() {
            for file in [lower, upper, upperMap] { Glibc.close(file.descriptor) }
            if let lowerMap { Glibc.close(lowerMap.descriptor) }
        }
    }

    private func openBoth(
        _ directory: borrowing Directory, _ lower: Layer, _ upper: Layer
    ) throws(BackendError) -> Pair {
        var descriptors: [Int32] = []
        do throws(BackendError) {
            let wanted = [
                (lower.dataFile, O_RDWR), (upper.dataFile, O_RDONLY), (upper.mapFile, O_RDONLY),
                (lower.mapFile, O_RDONLY),
            ]
            var files: [LayerFile] = []
            for (file, flags) in wanted {
                descriptors.append(try directory.open(file, flags))
                files.append(LayerFile(descriptor: descriptors[descriptors.count - 1], path: "\(path)/\(file)"))
            }
            let length = try files[2].length()
            let clusters = length > Layer.headerSize ? Int(length - Layer.headerSize) : 0
            guard clusters <= Layer.clusters(Layer.maximumSize) else {
                throw BackendError(
                    code: EIO, message: "\(files[2].path) is damaged: it has \(length) bytes, and no volume is so large"
                )
            }
            let hasMap = lower.parent != nil
            if !hasMap { Glibc.close(descriptors[3]) }
            return Pair(
                lower: files[0], upper: files[1], lowerMap: hasMap ? files[3] : nil, upperMap: files[2],
                clusters: clusters)
        } catch {
            for descriptor in descriptors { Glibc.close(descriptor) }
            throw error
        }
    }

    /// Copies what the upper layer has into the lower one.
    /// - Returns: false when it was stopped.
    private func copy(_ files: Pair, _ stop: () -> Bool) throws(BackendError) -> Bool {
        try files.lower.extend(to: UInt64(files.clusters) * Layer.cluster)
        var stopped = false
        try files.upperMap.forEachRun(files.clusters) { (run) throws(BackendError) in
            var position = UInt64(run.lowerBound) * Layer.cluster
            let end = UInt64(run.upperBound) * Layer.cluster
            while position < end, !stopped {
                let piece = position..<min(end, position + (16 << 20))
                var hole = piece.lowerBound
                try files.upper.forEachData(in: piece) { (range) throws(BackendError) in
                    if range.lowerBound > hole { try files.lower.clear(hole..<range.lowerBound) }
                    try files.lower.copy(range, from: files.upper)
                    hole = range.upperBound
                }
                if piece.upperBound > hole { try files.lower.clear(hole..<piece.upperBound) }
                position = piece.upperBound
                stopped = stop()
            }
        }
        guard !stopped else { return false }
        try files.lower.synchronize()
        return true
    }

    /// Writes the map of two layers in one.
    private func writeUnion(
        _ directory: borrowing Directory, _ layer: Layer, _ file: String, _ files: Pair
    ) throws(BackendError) {
        let descriptor = try directory.open(file, O_RDWR | O_CREAT | O_EXCL)
        defer { Glibc.close(descriptor) }
        let map = LayerFile(descriptor: descriptor, path: "\(path)/\(file)")
        try map.writeHeader(layer)
        if let lowerMap = files.lowerMap {
            try map.extend(to: Layer.headerSize + UInt64(files.clusters))
            for source in [lowerMap, files.upperMap] {
                try source.forEachRun(files.clusters) { (run) throws(BackendError) in try map.mark(run) }
            }
        } else {
            try map.extend(to: Layer.headerSize)
        }
        try map.synchronize()
    }
}
