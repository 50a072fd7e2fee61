import Backend
import CLinux
import EventLoop
import Glibc

/// The layers of a pool and who refers to them, as far as that can be read.
struct LayerTree {
    /// The descriptions that can be read.
    fileprivate(set) var descriptions: [VolumeDescription] = []
    /// Volumes whose description cannot be read, or a layer of theirs.
    fileprivate(set) var damaged: [DamagedVolume] = []
    /// Whether every description could be read: otherwise there may be heads and snapshots that nobody knows of.
    fileprivate(set) var knowsAllVolumes = true
    /// Every layer of the directory whose header can be read, needed or not.
    fileprivate(set) var layers: [UInt64: Layer] = [:]
    /// Those whose header cannot.
    fileprivate(set) var unreadable: [UInt64: BackendError] = [:]
    /// The names of all files of layers.
    fileprivate(set) var names: Set<String> = []
    /// Those in the chains of heads and snapshots.
    fileprivate(set) var needed: Set<UInt64> = []

    /// Whether a layer is missing, or cannot be read, below a volume of which nothing else is known then.
    fileprivate(set) var hasBrokenChain = false

    /// Whether what is not needed here is needed by nobody.
    var isWhole: Bool { damaged.isEmpty }

    func children(of id: UInt64) -> [Layer] { layers.values.filter { $0.parent == id } }

    func isHead(_ id: UInt64) -> Bool { descriptions.contains { $0.head == id } }
    func isSnapshot(_ id: UInt64) -> Bool { descriptions.contains { $0.snapshots.contains { $0.layer == id } } }

    /// Whether all are known that can refer to the layer as their head or snapshot: only its owner does.
    func knowsUsers(of layer: Layer) -> Bool {
        knowsAllVolumes || descriptions.contains { $0.record.id == layer.owner }
    }

    /// Whether nothing but one child needs the layer: then it can be merged with that child.
    func onlyChild(of id: UInt64) -> Layer? {
        guard needed.contains(id), let layer = layers[id], unreadable.isEmpty, knowsUsers(of: layer), !isHead(id),
            !isSnapshot(id)
        else { return nil }
        let children = children(of: id)
        return children.count == 1 ? children[0] : nil
    }

    /// Whether the layer was made since.
    func lacks(_ layer: Layer) -> Bool { !names.contains(layer.mapFile) }

    /// Files that are needed.
    var files: Set<String> { Set(needed.compactMap { layers[$0] }.flatMap { [$0.mapFile, $0.dataFile] }) }
}

// A volume with snapshots lives in layers. Its description alone says which layer is its head and which are its
// snapshots, and each change of that is one rename; the marker file stands from before the first new layer is made until
// after the last old one is removed, and whoever finds it clears up. What a change is known to have made needless is
// removed with it. What is merely found to be needed by nobody is moved aside, and goes a while later.
extension LocalPool {
    static let marker = "~layers"
    static let aside = "~aside-"
    /// Seconds for which what was moved aside is kept.
    static let asideTime: Int64 = 900

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
        try chain(to: id) { (id) throws(BackendError) in try layer(directory, id) }
    }

    private func chain(
        to id: UInt64, _ layer: (UInt64) throws(BackendError) -> Layer
    ) throws(BackendError) -> [Layer] {
        var chain: [Layer] = []
        var next: UInt64? = id
        while let id = next {
            guard chain.count <= Layer.maximumDepth else {
                throw BackendError(code: EIO, message: "\(path)/\(Layer.mapFile(id)) is damaged: its layers never end")
            }
            let layer = try layer(id)
            chain.append(layer)
            next = layer.parent
        }
        return chain.reversed()
    }

    func tree(_ directory: borrowing Directory) throws(BackendError) -> LayerTree {
        var tree = LayerTree()
        for file in try directory.names() {
            if file.hasPrefix(Layer.prefix) { tree.names.insert(file) }
            if let id = Layer.id(ofMap: file) {
                do throws(BackendError) { tree.layers[id] = try layer(directory, id) } catch {
                    tree.unreadable[id] = error
                }
            } else if let volume = Self.volume(of: file) {
                do throws(BackendError) { tree.descriptions.append(try describe(directory, volume)) } catch {
                    // Deleted since the directory was read.
                    if error.code == ENOENT { continue }
                    tree.damaged.append(DamagedVolume(volume: volume, reason: error.message))
                    tree.knowsAllVolumes = false
                }
            }
        }
        for description in tree.descriptions {
            do throws(BackendError) {
                for start in [description.head].compactMap(\.self) + description.snapshots.map(\.layer) {
                    let chain = try chain(to: start) { (id) throws(BackendError) in
                        if let layer = tree.layers[id] { return layer }
                        throw tree.unreadable[id]
                            ?? BackendError(code: ENOENT, message: "\(path)/\(Layer.mapFile(id)) is missing")
                    }
                    tree.needed.formUnion(chain.map(\.id))
                }
            } catch {
                tree.damaged.append(DamagedVolume(volume: description.record.volume, reason: error.message))
                tree.hasBrokenChain = true
            }
        }
        tree.damaged.sort { $0.volume < $1.volume }
        return tree
    }

    // MARK: Changes

    func placeMarker(_ directory: borrowing Directory) throws(BackendError) {
        // Empty, since what frees space has to work where there is none.
        if try directory.exists(Self.marker) { return }
        Glibc.close(try directory.open(Self.marker, O_RDWR | O_CREAT))
        try directory.synchronize()
    }

    /// Does the steps of a change, and removes what nobody needs after it, whether it succeeded or not.
    func changing(
        _ directory: borrowing Directory, _ body: (borrowing Directory) throws(BackendError) -> Void
    ) throws(BackendError) {
        let before = try tree(directory)
        try placeMarker(directory)
        let failure: BackendError?
        do throws(BackendError) {
            try body(directory)
            failure = nil
        } catch { failure = error }
        clearUp(directory, after: before)
        if let failure { throw failure }
    }

    /// What cannot be removed now is found by the marker, and decides nothing about the change.
    func clearUp(_ directory: borrowing Directory, after before: LayerTree) {
        do throws(BackendError) { try removeNeedless(directory, after: before) } catch {
            report("pool \(name): left to be cleared up later: \(error.message)")
        }
    }

    /// Removes what a change, or an interrupted one, has left behind, as far as it can be told.
    /// - Parameter before: what was needed before the change; nil when that is not known.
    func removeNeedless(_ directory: borrowing Directory, after before: LayerTree?) throws(BackendError) {
        let tree = try self.tree(directory)
        try settleNames(directory, tree)
        let needed = tree.files
        var isDone = true
        for file in needless(tree, before, needed) { try directory.remove(file) }
        for file in try directory.names() where file.hasPrefix(Layer.prefix) && !needed.contains(file) {
            if try !moveAside(directory, file, tree) { isDone = false }
        }
        if tree.needed.isEmpty, tree.isWhole { try directory.remove(Self.spare) }
        try directory.synchronize()
        guard isDone else { return }
        try directory.remove(Self.marker)
        try directory.synchronize()
    }

    /// Files that were needed before a change, or made by it, and are not needed since: nobody else can need them.
    private func needless(
        _ now: LayerTree, _ before: LayerTree?, _ needed: Set<String>
    ) -> [String] {
        guard let before, before.unreadable.isEmpty, now.unreadable.isEmpty else { return [] }
        // What was read before and could not be read now is needed as before.
        let wasDamaged = Set(before.damaged.map(\.volume))
        guard now.damaged.allSatisfy({ wasDamaged.contains($0.volume) }) else { return [] }
        let gone = before.needed.subtracting(now.needed)
        // A volume that cannot be read may stand on a layer without anybody's knowing.
        let isKept = { (layer: Layer) in
            now.hasBrokenChain || !(now.knowsAllVolumes || before.knowsUsers(of: layer))
                || now.children(of: layer.id).contains { !gone.contains($0.id) && !before.lacks($0) }
        }
        var files = before.files.union(now.names.subtracting(before.names)).subtracting(needed)
        for layer in gone.compactMap({ before.layers[$0] }) where isKept(layer) {
            files.subtract([layer.mapFile, layer.dataFile])
        }
        return files.sorted()
    }

    /// The data of a volume has its own name as well as a layer's while the volume's first snapshot is made, and while its
    /// last one goes.
    private func settleNames(_ directory: borrowing Directory, _ tree: LayerTree) throws(BackendError) {
        for description in tree.descriptions {
            let file = Self.data(description.record.volume)
            guard let own = try directory.status(of: file), own.st_nlink > 1 else { continue }
            for name in try directory.names() where name.hasPrefix(Layer.prefix) {
                guard let status = try directory.status(of: name), status.st_dev == own.st_dev,
                    status.st_ino == own.st_ino
                else { continue }
                if description.head == nil {
                    guard !tree.files.contains(name) else { continue }
                    // It was made longer, to whole clusters, and the volume grows by nothing but what somebody wants.
                    let data = try directory.open(file, O_RDWR)
                    defer { Glibc.close(data) }
                    try LayerFile(descriptor: data, path: "\(path)/\(file)").cut(to: description.record.size)
                    try directory.remove(name)
                } else if tree.files.contains(name) {
                    try directory.remove(file)
                }
            }
        }
    }

    /// Renames a file that nobody seems to need, for the case that it is needed.
    /// - Returns: false when it stays: not everything that might need it can be read, or it is in use.
    private func moveAside(
        _ directory: borrowing Directory, _ file: String, _ tree: LayerTree
    ) throws(BackendError) -> Bool {
        guard tree.isWhole else {
            reportOnce(
                "pool \(name): files of layers are left in \(path) while not all is known:"
                    + " \(tree.damaged[0].volume) cannot be read (\(tree.damaged[0].reason))")
            return false
        }
        guard let status = try directory.status(of: file) else { return true }
        if status.st_mode & S_IFMT == S_IFREG {
            let descriptor = try directory.open(file, O_RDONLY)
            defer { Glibc.close(descriptor) }
            guard try LayerFile(descriptor: descriptor, path: "\(path)/\(file)").lock(LOCK_EX) else { return false }
        }
        let kept = "\(Self.aside)\(time(nil))-\(file)"
        try directory.renameNew(file, to: kept)
        report(
            "pool \(name): no volume needs \(path)/\(file); it is kept as \(kept) for \(Self.asideTime / 60) minutes")
        return true
    }

    /// Removes what was moved aside long ago.
    /// - Returns: whether there is nothing else that was moved aside.
    func removeAside(_ directory: borrowing Directory, _ names: [String]) throws(BackendError) -> Bool {
        var isDone = true
        for file in names where file.hasPrefix(Self.aside) {
            let digits = file.dropFirst(Self.aside.utf8.count).prefix { $0 != "-" }
            // Not by a clock that stands at another time than the one that moved it.
            guard let moved = Int64(digits), (Self.asideTime...Int64(100 * 86400)).contains(Int64(time(nil)) - moved)
            else {
                isDone = false
                continue
            }
            try directory.remove(file)
            report("pool \(name): removed \(path)/\(file), which no volume needed")
        }
        return isDone
    }

    func newLayerID() -> UInt64 { .random(in: 1 ... .max) }

    /// Makes an empty layer on top of another, to be written to in this boot.
    func makeLayer(
        _ directory: borrowing Directory, on parent: UInt64, size: UInt64, owner: UInt64, written: Bool = false
    ) throws(BackendError) -> Layer {
        let id = newLayerID()
        var layer = Layer(id: id, parent: parent, data: id, owner: owner)
        if written { layer.state = .written(boot: try Boot.identifier()) }
        let descriptor = try directory.open(layer.dataFile, O_RDWR | O_CREAT | O_EXCL)
        defer { Glibc.close(descriptor) }
        let data = LayerFile(descriptor: descriptor, path: "\(path)/\(layer.dataFile)")
        try data.extend(to: Layer.padded(size))
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
}
