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
    /// Why nothing may be written any more; nil when it may.
    private let stopped = Mutex<BackendError?>(nil)

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
        if let error = stopped.withLock({ $0 }) { throw error }
        do {
            return try LayeredVolume(self, loop: loop, buffers: buffers, client: client)
        } catch { throw BackendError(error) }
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let grown = try pool.grow(self, to: size)
        current.withLock { $0 = grown }
        return grown
    }

    func dueChange() throws(BackendError) -> StoreChange? { try pool.dueChange(self) }

    func settle() throws(BackendError) {
        if !readOnly { try headFile.settle() }
    }

    func failFlushes() { hasFailed.store(true, ordering: .relaxed) }

    /// Nothing may be written any more, until it is opened anew. From any thread.
    func stop(_ error: BackendError) {
        stopped.withLock { $0 = error }
        pool.report("\(pool.name)/\(record.volume): \(error.message)")
    }

    func prepare(
        _ change: StoreChange, giveUp: () -> BackendError?
    ) throws(BackendError) -> any PreparedChange {
        try pool.prepare(change, of: .layered(self), giveUp: giveUp)
    }

    func changeGivenUp() { map.unsettle() }

    /// Brings the map file of the head up to date with its data, for good. No backend is running while `hold` lasts.
    /// - Parameters:
    ///   - data: the head's, as here or with a descriptor of its own.
    ///   - mapFile: likewise.
    func writeMap(_ data: LayerFile, _ mapFile: LayerFile, _ hold: Hold) throws(BackendError) {
        if let error = stopped.withLock({ $0 }) { throw error }
        guard !hasFailed.load(ordering: .relaxed) else {
            throw BackendError(
                code: EIO,
                message: "\(headFile.path) could not be synchronised before; what was not flushed is uncertain")
        }
        try hold.whileWorking { () throws(BackendError) in _ = map.settleFresh() }
        do throws(BackendError) {
            do throws(BackendError) { try data.synchronize() } catch {
                hasFailed.store(true, ordering: .relaxed)
                throw error
            }
            var position = 0
            while let run = try hold.whileWorking({ () throws(BackendError) in map.nextSettling(from: position) }) {
                try mapFile.mark(run)
                position = run.upperBound
            }
            try mapFile.synchronize()
            try hold.whileWorking { () throws(BackendError) in map.markSettled() }
        } catch {
            // Whoever gave it up has done so.
            do throws(BackendError) { try hold.whileWorking { () throws(BackendError) in map.unsettle() } } catch {}
            throw error
        }
    }

    /// Says in the map file's header how far it can be relied on.
    func writeHeader(_ state: Layer.State) throws(BackendError) {
        guard let mapFile else { return }
        var layer = head
        layer.state = state
        try mapFile.writeHeader(layer)
        try mapFile.synchronize()
    }

    func close() {
        if let mapFile, !isReplaced.load(ordering: .relaxed) {
            // When it fails, the next open finds the marks of this boot, and makes them last.
            do throws(BackendError) {
                try writeMap(headFile, mapFile, Hold())
                try writeHeader(.closed)
            } catch {
                pool.report(
                    "\(pool.name)/\(record.volume) is closed without its map's being complete: \(error.message)")
            }
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
    /// - Parameter locked: the last layer's data, open and locked already; it is taken over, also on an error. No mark of
    ///   its map is for one boot alone.
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
            try extendFirst(directory, layers[0], files[0], to: record.size)
            let map = try ChainMap(clusters: Layer.clusters(record.size), head: layers.count - 1)
            for (index, layer) in layers.enumerated().dropFirst().dropLast() {
                let descriptor = try directory.open(layer.mapFile, O_RDONLY)
                defer { Glibc.close(descriptor) }
                let file = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.mapFile)")
                try file.forEachLasting(map.clusters) { (run) throws(BackendError) in map.set(run, to: index) }
            }
            let mapDescriptor = try directory.open(head.mapFile, readOnly ? O_RDONLY : O_RDWR)
            descriptors.append(mapDescriptor)
            let mapFile = LayerFile(descriptor: mapDescriptor, path: "\(path)/\(head.mapFile)")
            try readHead(directory, layers, files, mapFile, map, readOnly: readOnly)
            if readOnly {
                Glibc.close(mapDescriptor)
                return LayeredOpenVolume(
                    pool: self, record: record, readOnly: true, layers: layers, files: files, mapFile: nil, map: map)
            }
            let opened = LayeredOpenVolume(
                pool: self, record: record, readOnly: false, layers: layers, files: files, mapFile: mapFile, map: map)
            let state = Layer.State.written(boot: try Boot.identifier())
            if head.state != state { try opened.writeHeader(state) }
            return opened
        } catch {
            for descriptor in descriptors { Glibc.close(descriptor) }
            throw error
        }
    }

    /// What the last layer has. Where it is going to be written to, marks that hold for one boot alone are made to last, or
    /// go: after the next mark is made, nobody could tell them apart.
    private func readHead(
        _ directory: borrowing Directory, _ layers: [Layer], _ files: [LayerFile], _ mapFile: LayerFile,
        _ map: ChainMap, readOnly: Bool
    ) throws(BackendError) {
        guard layers.count > 1 else { return }
        let head = layers[layers.count - 1]
        let state = head.state
        let isThisBoot = if case .written(let boot) = state { try boot == Boot.identifier() } else { false }
        var counting: [Range<Int>] = []
        var lost: [Range<Int>] = []
        try mapFile.forEachRun(map.clusters) { (run, mark) throws(BackendError) in
            if mark == Layer.Mark.lasting || isThisBoot {
                map.set(run, to: Int(map.head), stage: ChainMap.Stage.marked)
            }
            if mark == Layer.Mark.inThisBoot { if isThisBoot { counting.append(run) } else { lost.append(run) } }
        }
        if state == .writtenWithoutMarks { return try adoptData(directory, layers, files, map) }
        guard !readOnly, !counting.isEmpty || !lost.isEmpty else { return }
        if !counting.isEmpty { try files[files.count - 1].synchronize() }
        for run in counting { try mapFile.mark(run) }
        for run in lost { try mapFile.mark(run, as: Layer.Mark.absent) }
        try mapFile.synchronize()
    }

    private func openHead(
        _ directory: borrowing Directory, _ head: Layer, _ record: VolumeRecord, readOnly: Bool, locked: Int32?
    ) throws(BackendError) -> LayerFile {
        let name = "\(path)/\(head.dataFile)"
        if let locked {
            // Descriptor, map and lock have to be of the same file.
            guard try directory.isNamed(locked, head.dataFile) else {
                throw BackendError(
                    code: ESTALE,
                    message: "\(name) is not the file that is open for \(self.name)/\(record.volume) any more")
            }
            return LayerFile(descriptor: locked, path: name)
        }
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
    /// - Parameter opened: its data, open.
    func extendFirst(
        _ directory: borrowing Directory, _ layer: Layer, _ opened: LayerFile, to size: UInt64
    ) throws(BackendError) {
        guard try opened.length() < Layer.padded(size) else { return }
        let descriptor = try directory.open(layer.dataFile, O_RDWR)
        defer { Glibc.close(descriptor) }
        try LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)").extend(to: Layer.padded(size))
    }

    /// A daemon that made no marks for one boot died while it wrote to this head. Clusters the map file has not got are in
    /// the data file, whole or in part, and the parts are made whole. That goes wrong where the file system has made holes
    /// of data or data of holes since; what such a daemon has left tells no more.
    private func adoptData(
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
        var closed = head
        closed.state = .closed
        try mapFile.writeHeader(closed)
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
