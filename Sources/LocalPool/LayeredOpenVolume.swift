import Backend
import CLinux
import EventLoop
import Glibc
import Synchronization

/// A chain of layers that is open: the head of a volume, locked, or a snapshot.
final class LayeredOpenVolume: OpenVolume, @unchecked Sendable {
    let pool: LocalPool
    let readOnly: Bool
    /// The first of the chain in front.
    let layers: [Layer]
    /// Their data.
    let files: [LayerFile]
    /// The last one's; nil when it is only read.
    let mapFile: LayerFile?
    /// Belongs to the backend while there is one, else to the blocking-work thread.
    let map: ChainMap
    private let current: Mutex<VolumeRecord>
    var record: VolumeRecord { current.withLock { $0 } }
    var protocolName: String { "local" }
    /// Opened anew: its files are somebody else's to complete.
    let isReplaced = Atomic<Bool>(false)
    /// Set when the data could not be synchronised: the map file must not say that it was.
    let hasFailed = Atomic<Bool>(false)

    init(
        pool: LocalPool, record: VolumeRecord, readOnly: Bool, layers: [Layer], files: [LayerFile], mapFile: LayerFile?,
        map: ChainMap
    ) {
        self.pool = pool
        current = Mutex(record)
        self.readOnly = readOnly
        self.layers = layers
        self.files = files
        self.mapFile = mapFile
        self.map = map
    }

    var head: Layer { layers[layers.count - 1] }
    var headFile: LayerFile { files[files.count - 1] }

    func start(
        on loop: EventLoop, buffers: BufferPool, client: any BackendClient
    ) throws(BackendError) -> any Backend {
        do {
            return try LayeredVolume(self, loop: loop, buffers: buffers, client: client)
        } catch { throw BackendError(error) }
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let grown = try pool.grow(self, to: size)
        current.withLock { $0 = grown }
        return grown
    }

    var dueChange: StoreChange? { pool.dueChange(self) }

    func settle() throws(BackendError) {
        if !readOnly { try headFile.settle() }
    }

    func failFlushes() { hasFailed.store(true, ordering: .relaxed) }

    func reopen(after change: StoreChange) throws(BackendError) -> any OpenVolume {
        try pool.reopen(.layered(self), after: change)
    }

    /// Brings the map file of the head up to date with its data. No backend is running.
    func writeMap() throws(BackendError) {
        guard let mapFile else { return }
        guard !hasFailed.load(ordering: .relaxed) else {
            throw BackendError(
                code: EIO,
                message: "\(headFile.path) could not be synchronised before; what was not flushed is uncertain")
        }
        do throws(BackendError) { try headFile.synchronize() } catch {
            hasFailed.store(true, ordering: .relaxed)
            throw error
        }
        if map.settleFresh() || map.nextSettling(from: 0) != nil {
            do throws(BackendError) {
                var position = 0
                while let run = map.nextSettling(from: position) {
                    try mapFile.mark(run)
                    position = run.upperBound
                }
                try mapFile.synchronize()
            } catch {
                map.unsettle()
                throw error
            }
            map.markSettled()
        } else {
            try mapFile.synchronize()
        }
    }

    /// Says in the map file's header whether it can be relied on alone.
    func writeHeader(isComplete: Bool) throws(BackendError) {
        guard let mapFile else { return }
        var layer = head
        layer.isComplete = isComplete
        try mapFile.writeHeader(layer)
        try mapFile.synchronize()
    }

    func close() {
        if !readOnly, !isReplaced.load(ordering: .relaxed) {
            // When it fails, the next open finds the header as it is now, and goes by the data.
            do throws(BackendError) {
                try writeMap()
                try writeHeader(isComplete: true)
            } catch {}
        }
        release()
    }

    /// Closes the files, as they are.
    func release() {
        for file in files { Glibc.close(file.descriptor) }
        if let mapFile { Glibc.close(mapFile.descriptor) }
    }
}

extension LocalPool {
    /// Opens the chain that ends with a layer. Called under the pool's lock.
    /// - Parameter locked: the last layer's data, open and locked already; it is taken over, also on an error.
    func openChain(
        _ directory: borrowing Directory, to top: UInt64, record: VolumeRecord, readOnly: Bool, locked: Int32? = nil
    ) throws(BackendError) -> LayeredOpenVolume {
        var descriptors: [Int32] = locked.map { [$0] } ?? []
        do throws(BackendError) {
            let layers = try chain(directory, to: top)
            var files: [LayerFile] = []
            for layer in layers.dropLast() {
                let descriptor = try directory.open(layer.dataFile, O_RDONLY)
                descriptors.append(descriptor)
                files.append(LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)"))
            }
            let head = layers[layers.count - 1]
            let headFile = try openHead(directory, head, record, readOnly: readOnly, locked: locked)
            if locked == nil { descriptors.append(headFile.descriptor) }
            files.append(headFile)
            try extendFirst(directory, layers[0], to: record.size)
            let map = try ChainMap(clusters: Layer.clusters(record.size), head: layers.count - 1)
            for (index, layer) in layers.enumerated().dropFirst() {
                try read(directory, layer) { run in
                    memset(map.entries + run.lowerBound, Int32(index), run.count)
                    if index == layers.count - 1 {
                        memset(map.stages + run.lowerBound, Int32(ChainMap.Stage.marked), run.count)
                    }
                } clusters: {
                    map.clusters
                }
            }
            if !head.isComplete, locked == nil { try recoverHead(directory, layers, files, map) }
            guard !readOnly else {
                return LayeredOpenVolume(
                    pool: self, record: record, readOnly: true, layers: layers, files: files, mapFile: nil, map: map)
            }
            let mapDescriptor = try directory.open(head.mapFile, O_RDWR)
            descriptors.append(mapDescriptor)
            let opened = LayeredOpenVolume(
                pool: self, record: record, readOnly: false, layers: layers, files: files,
                mapFile: LayerFile(descriptor: mapDescriptor, path: "\(path)/\(head.mapFile)"), map: map)
            try opened.writeHeader(isComplete: false)
            return opened
        } catch {
            for descriptor in descriptors { Glibc.close(descriptor) }
            throw error
        }
    }

    private func openHead(
        _ directory: borrowing Directory, _ head: Layer, _ record: VolumeRecord, readOnly: Bool, locked: Int32?
    ) throws(BackendError) -> LayerFile {
        let name = "\(path)/\(head.dataFile)"
        if let locked { return LayerFile(descriptor: locked, path: name) }
        let descriptor = try directory.open(head.dataFile, readOnly ? O_RDONLY : O_RDWR)
        let file = LayerFile(descriptor: descriptor, path: name)
        do throws(BackendError) {
            guard try file.lock(readOnly ? LOCK_SH : LOCK_EX) else {
                throw BackendError(
                    code: EBUSY, message: "\(self.name)/\(record.volume) is in use (\(name) is locked); unmap it first")
            }
            guard try file.length() >= (head.parent == nil ? 0 : Layer.padded(record.size)) else {
                throw BackendError(
                    code: EIO,
                    message: "\(name) is shorter than \(self.name)/\(record.volume); data is missing, restore the file")
            }
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        return file
    }

    /// The first layer has all clusters, holes where nothing was written. It is as long as the longest of those above it.
    func extendFirst(_ directory: borrowing Directory, _ layer: Layer, to size: UInt64) throws(BackendError) {
        let descriptor = try directory.open(layer.dataFile, O_RDWR)
        defer { Glibc.close(descriptor) }
        try LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)").extend(to: Layer.padded(size))
    }

    private func read(
        _ directory: borrowing Directory, _ layer: Layer, _ body: (Range<Int>) -> Void, clusters: () -> Int
    ) throws(BackendError) {
        let descriptor = try directory.open(layer.mapFile, O_RDONLY)
        defer { Glibc.close(descriptor) }
        let file = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.mapFile)")
        try file.forEachRun(clusters()) { (run) throws(BackendError) in body(run) }
    }

    /// The daemon died while it wrote to this head. Clusters the map file has not got yet are in the data file, whole or
    /// in part: what was acknowledged is whole after the daemon's death, what was flushed is in the map file after a
    /// power cut, and of the rest each block that is there is as good as what is below. The parts are made whole.
    private func recoverHead(
        _ directory: borrowing Directory, _ layers: [Layer], _ files: [LayerFile], _ map: ChainMap
    ) throws(BackendError) {
        let head = layers[layers.count - 1]
        let dataDescriptor = try directory.open(head.dataFile, O_RDWR)
        defer { Glibc.close(dataDescriptor) }
        let mapDescriptor = try directory.open(head.mapFile, O_RDWR)
        defer { Glibc.close(mapDescriptor) }
        let data = LayerFile(descriptor: dataDescriptor, path: "\(path)/\(head.dataFile)")
        let mapFile = LayerFile(descriptor: mapDescriptor, path: "\(path)/\(head.mapFile)")
        var found: [Range<Int>] = []
        let end = UInt64(map.clusters) * Layer.cluster
        try data.forEachData(in: 0..<end) { (range) throws(BackendError) in
            var cluster = Int(range.lowerBound / Layer.cluster)
            while UInt64(cluster) * Layer.cluster < range.upperBound {
                if map.stages[cluster] == ChainMap.Stage.none {
                    map.stages[cluster] = ChainMap.Stage.settling
                    if let last = found.last, last.upperBound == cluster {
                        found[found.count - 1] = last.lowerBound..<cluster + 1
                    } else {
                        found.append(cluster..<cluster + 1)
                    }
                }
                cluster += 1
            }
        }
        for run in found {
            for cluster in run { try fill(cluster, data, files[Int(map.entries[cluster])]) }
        }
        try data.synchronize()
        for run in found {
            try mapFile.mark(run)
            memset(map.stages + run.lowerBound, Int32(ChainMap.Stage.marked), run.count)
            memset(map.entries + run.lowerBound, Int32(map.head), run.count)
        }
        try mapFile.synchronize()
        var complete = head
        complete.isComplete = true
        try mapFile.writeHeader(complete)
        try mapFile.synchronize()
    }

    /// Copies what a cluster does not have from below.
    private func fill(_ cluster: Int, _ data: LayerFile, _ below: LayerFile) throws(BackendError) {
        let start = UInt64(cluster) * Layer.cluster
        var holes: [Range<UInt64>] = []
        var position = start
        try data.forEachData(in: start..<start + Layer.cluster) { (range) throws(BackendError) in
            if range.lowerBound > position { holes.append(position..<range.lowerBound) }
            position = range.upperBound
        }
        if position < start + Layer.cluster { holes.append(position..<start + Layer.cluster) }
        for hole in holes {
            try below.forEachData(in: hole) { (range) throws(BackendError) in try data.copy(range, from: below) }
        }
    }
}
