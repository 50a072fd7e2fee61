import Backend
import CLinux
import EventLoop
import Glibc

/// The layers of a pool and who refers to them.
struct LayerTree {
    var volumes: [VolumeDescription] = []
    var layers: [UInt64: Layer] = [:]

    func children(of id: UInt64) -> [Layer] { layers.values.filter { $0.parent == id } }

    func isHead(_ id: UInt64) -> Bool { volumes.contains { $0.head == id } }
    func isSnapshot(_ id: UInt64) -> Bool { volumes.contains { $0.snapshots.contains { $0.layer == id } } }

    /// Whether nothing but one child needs the layer: then it can be merged with that child.
    func onlyChild(of id: UInt64) -> Layer? {
        guard !isHead(id), !isSnapshot(id) else { return nil }
        let children = children(of: id)
        return children.count == 1 ? children[0] : nil
    }
}

// A volume with snapshots lives in layers. Its description alone says which layer is its head and which are its
// snapshots, and each change of that is one rename; the marker file stands from before the first new layer is made until
// after the last old one is removed, and whoever finds it removes what nobody refers to.
extension LocalPool {
    static let marker = "~layers"

    func layer(_ directory: borrowing Directory, _ id: UInt64) throws(BackendError) -> Layer {
        let file = Layer.mapFile(id)
        let descriptor = try directory.open(file, O_RDONLY)
        defer { Glibc.close(descriptor) }
        let map = LayerFile(descriptor: descriptor, path: "\(path)/\(file)")
        let header = UnsafeMutableRawBufferPointer.allocate(byteCount: Layer.headerText, alignment: 1)
        defer { header.deallocate() }
        let count = try map.read(header, at: 0)
        return try Layer.decode(header.prefix(count), id: id, file: map.path)
    }

    /// The layers from the first of a chain to this one.
    func chain(_ directory: borrowing Directory, to id: UInt64) throws(BackendError) -> [Layer] {
        var chain: [Layer] = []
        var next: UInt64? = id
        while let id = next {
            guard chain.count <= Layer.maximumDepth else {
                throw BackendError(code: EIO, message: "\(path)/\(Layer.mapFile(id)) is damaged: its layers never end")
            }
            let layer = try layer(directory, id)
            chain.append(layer)
            next = layer.parent
        }
        return chain.reversed()
    }

    func tree(_ directory: borrowing Directory) throws(BackendError) -> LayerTree {
        var tree = LayerTree()
        for file in try directory.names() where !file.hasPrefix(Self.ours) && !file.hasPrefix(Layer.prefix) {
            guard file.hasSuffix(Self.describedBy), file != Self.describedBy else { continue }
            tree.volumes.append(try describe(directory, String(file.dropLast(Self.describedBy.count))))
        }
        for volume in tree.volumes {
            for start in [volume.head].compactMap(\.self) + volume.snapshots.map(\.layer) {
                var next: UInt64? = start
                while let id = next, tree.layers[id] == nil {
                    let layer = try layer(directory, id)
                    tree.layers[id] = layer
                    next = layer.parent
                }
            }
        }
        return tree
    }

    /// Removes what an interrupted change left behind, as far as it can be told: while a description or a layer cannot
    /// be read, nothing is removed, and who opens that volume is told.
    func removeUnreferenced(_ directory: borrowing Directory) throws(BackendError) {
        let tree: LayerTree
        do { tree = try self.tree(directory) } catch { return }
        let data = Set(tree.layers.values.map(\.dataFile))
        let needed = data.union(tree.layers.values.map(\.mapFile))
        var identities: [[UInt64]] = []
        for file in data { if let identity = try identity(directory, file) { identities.append(identity) } }
        for file in try directory.names() where file.hasPrefix(Layer.prefix) && !needed.contains(file) {
            try directory.remove(file)
        }
        // The name its data had before the first snapshot.
        for volume in tree.volumes where volume.head != nil {
            let file = Self.data(volume.record.volume)
            if let identity = try identity(directory, file), identities.contains(identity) {
                try directory.remove(file)
            }
        }
        try directory.synchronize()
        try directory.remove(Self.marker)
        try directory.synchronize()
    }

    /// Which file a name means.
    private func identity(_ directory: borrowing Directory, _ file: String) throws(BackendError) -> [UInt64]? {
        guard let status = try directory.status(of: file) else { return nil }
        return [UInt64(status.st_dev), UInt64(status.st_ino)]
    }

    func placeMarker(_ directory: borrowing Directory) throws(BackendError) {
        try directory.write("layers are being changed; the next look at the pool cleans up\n", to: Self.marker)
        try directory.synchronize()
    }

    /// Does the steps of a change, and removes what nobody needs after it, whether it succeeded or not.
    func changing<Value>(
        _ directory: borrowing Directory, _ body: (borrowing Directory) throws(BackendError) -> Value
    ) throws(BackendError) -> Value {
        try placeMarker(directory)
        // What cannot be removed now is found by the marker, and decides nothing about the change.
        defer { do throws(BackendError) { try removeUnreferenced(directory) } catch {} }
        return try body(directory)
    }

    func newLayerID() -> UInt64 { .random(in: 1 ... .max) }

    /// Makes an empty layer on top of another.
    func makeLayer(
        _ directory: borrowing Directory, on parent: UInt64, size: UInt64
    ) throws(BackendError) -> Layer {
        let id = newLayerID()
        let layer = Layer(id: id, parent: parent, data: id, isComplete: true)
        let descriptor = try directory.open(layer.dataFile, O_RDWR | O_CREAT | O_EXCL)
        defer { Glibc.close(descriptor) }
        let data = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)")
        try data.extend(to: Layer.padded(size))
        try checkHoles(data)
        try data.synchronize()
        try makeMap(directory, layer, size: size)
        return layer
    }

    func makeMap(_ directory: borrowing Directory, _ layer: Layer, size: UInt64) throws(BackendError) {
        let descriptor = try directory.open(layer.mapFile, O_RDWR | O_CREAT | O_EXCL)
        defer { Glibc.close(descriptor) }
        let map = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.mapFile)")
        try map.writeHeader(layer)
        try map.extend(to: Layer.headerSize + UInt64(layer.parent == nil ? 0 : Layer.clusters(size)))
        try map.synchronize()
    }

    /// After the daemon's death the holes of the head's data tell what was written: block by block, and blocks must not
    /// be larger than a cluster.
    private func checkHoles(_ file: LayerFile) throws(BackendError) {
        var status = statfs()
        let known = fstatfs(file.descriptor, &status) == 0 && UInt64(status.f_bsize) <= Layer.cluster
        guard known, lseek(file.descriptor, 0, SEEK_DATA) < 0, errno == ENXIO,
            fallocate(
                file.descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, off_t(Layer.cluster)) == 0
        else {
            throw BackendError(
                code: EOPNOTSUPP,
                message: "no snapshots in pool \(name): the file system of \(path) does not tell holes from data;"
                    + " ext4, xfs, btrfs and tmpfs do")
        }
    }
}
