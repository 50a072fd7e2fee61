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
//
// Whoever has a layer open at the top of a chain has its data file locked, and no merge gives a layer another data file
// while it is: descriptor, map and lock of an open layer are of one arrangement of files until it is opened anew.
extension LocalPool {
    /// Bytes of a head that may be copied while I/O is held back.
    static let smallHead: UInt64 = 32 << 20

    package func tidy(stop: () -> Bool) throws(BackendError) -> TidyOutcome {
        var outcome = TidyOutcome()
        // A pool that nobody has used yet is left unmade, and one that cannot be written to as it is.
        guard try isMade() else { return outcome }
        guard let isClear = try clearUpLeftovers() else { return outcome }
        outcome.isLeft = !isClear
        /// Somebody else works on them, or has them open, or there is no room to merge them.
        var busy: Set<UInt64> = []
        var failure: BackendError?
        while !stop() {
            guard let lower = try nextToMerge(except: busy) else { break }
            do throws(BackendError) {
                if try merge(lower, stop) { outcome.changed = true } else { busy.insert(lower) }
            } catch {
                busy.insert(lower)
                failure = failure ?? error
            }
        }
        if let failure { throw failure }
        outcome.isLeft = outcome.isLeft || !busy.isEmpty
        return outcome
    }

    private func isMade() throws(BackendError) -> Bool {
        var status = stat()
        do throws(SystemError) { try retrying("look at \(path)") { stat(path, &status) } } catch {
            guard error.code == ENOENT else { throw BackendError(error) }
            return false
        }
        return true
    }

    /// - Returns: whether nothing is left that time has to pass for; nil when nothing can be changed.
    private func clearUpLeftovers() throws(BackendError) -> Bool? {
        let directory = try openDirectory()
        let (lock, isReadOnly) = try directory.lockForReading()
        defer { if let lock { Glibc.close(lock) } }
        return isReadOnly ? nil : try recover(directory)
    }

    private func nextToMerge(except busy: Set<UInt64>) throws(BackendError) -> UInt64? {
        let tree = try self.tree(try openDirectory())
        return tree.layers.keys.filter { !busy.contains($0) && tree.onlyChild(of: $0) != nil }.min()
    }

    /// - Returns: false when somebody has it in use.
    private func merge(_ id: UInt64, _ stop: () -> Bool) throws(BackendError) -> Bool {
        let directory = try openDirectory()
        var lock = try directory.lock()
        defer { if lock >= 0 { Glibc.close(lock) } }
        let tree = try self.tree(directory)
        guard let lower = tree.layers[id], let upper = tree.onlyChild(of: id) else { return true }
        if let volume = tree.descriptions.first(where: { $0.head == upper.id }) {
            Glibc.close(lock)
            lock = -1
            return try mergeClosedHead(volume.record.volume)
        }
        let files = try openBoth(directory, lower, upper)
        defer { files.close() }
        // The lower one is held against another daemon's merge. That the upper one is not in use is asked now and then, so
        // that it can be mapped meanwhile; that it is not counts at the end.
        guard try files.lower.lock(LOCK_EX), try files.upper.lock(LOCK_EX) else { return false }
        try files.upper.unlock()
        Glibc.close(lock)
        lock = -1
        guard try copy(files, stop) else { return false }
        lock = try directory.lock()
        let now = try self.tree(directory)
        guard now.onlyChild(of: id) == upper, now.layers[id] == lower, !now.isHead(upper.id) else { return true }
        guard try files.upper.lock(LOCK_EX) else { return false }
        try changing(directory) { (directory) throws(BackendError) in
            var merged = upper
            merged.parent = lower.parent
            merged.data = lower.data
            let draft = Self.ours + upper.mapFile
            try directory.remove(draft)
            do throws(BackendError) {
                try writeUnion(directory, merged, draft, files)
                try directory.rename(draft, to: upper.mapFile)
            } catch {
                removeDraft(directory, draft)
                throw error
            }
            try directory.synchronize()
        }
        return true
    }

    private func mergeClosedHead(_ volume: String) throws(BackendError) -> Bool {
        do throws(BackendError) { try change(volume, .tidy) } catch {
            guard error.code == EBUSY else { throw error }
            return false
        }
        return true
    }

    // MARK: Copying

    struct Pair {
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

    func openBoth(
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

    /// Copies what the upper layer has into the lower one. Where there is no room for that, the space is given back at least
    /// that both have taken for the same clusters.
    /// - Returns: false when it was stopped.
    func copy(_ files: Pair, _ stop: () -> Bool) throws(BackendError) -> Bool {
        do throws(BackendError) { return try copyAll(files, stop) } catch {
            guard error.code == ENOSPC || error.code == EDQUOT else { throw error }
            // Nobody reads them but through the upper layer, which has them for good.
            try files.upperMap.forEachLasting(files.clusters) { (run) throws(BackendError) in
                try files.lower.punch(UInt64(run.lowerBound) * Layer.cluster..<UInt64(run.upperBound) * Layer.cluster)
            }
            throw error
        }
    }

    private func copyAll(_ files: Pair, _ stop: () -> Bool) throws(BackendError) -> Bool {
        try files.lower.extend(to: UInt64(files.clusters) * Layer.cluster)
        var stopped = false
        try files.upperMap.forEachLasting(files.clusters) { (run) throws(BackendError) in
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
    func writeUnion(
        _ directory: borrowing Directory, _ layer: Layer, _ file: String, _ files: Pair
    ) throws(BackendError) {
        let descriptor = try directory.open(file, O_RDWR | O_CREAT | O_EXCL)
        defer { Glibc.close(descriptor) }
        let map = LayerFile(descriptor: descriptor, path: "\(path)/\(file)")
        try map.writeHeader(layer)
        if let lowerMap = files.lowerMap {
            try map.extend(to: Layer.headerSize + UInt64(files.clusters))
            for source in [lowerMap, files.upperMap] {
                try source.forEachLasting(files.clusters) { (run) throws(BackendError) in try map.mark(run) }
            }
        } else {
            try map.extend(to: Layer.headerSize)
        }
        try map.synchronize()
    }
}
