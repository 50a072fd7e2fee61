import Backend
import Glibc
import NBD
import Testing
import Volumes

/// What survives the daemon, and what may not be believed of it.
@Suite struct MappingStoreTests {
    private let folder: Folder
    private var state: String { folder.path + "/state" }

    init() throws { folder = try Folder() }

    private func document(
        _ pool: String = "pool", _ volume: String = "volume", device: DeviceIdentifier? = nil
    ) -> MappingDocument {
        MappingDocument(
            pool: pool, volume: volume, volumeID: 1 << 24, config: "/etc/qbd.conf", readOnly: false, deviceID: 0,
            device: device.map { .init(identifier: $0.description) })
    }

    // MARK: Long names

    @Test func everyNameThatAVolumeMayHaveHasAFile() throws {
        let long = String(repeating: "n", count: 128)
        let names = [
            ("p", "v"), (long, long), (long, String(long.dropLast()) + "m"), (long, "\(long)@\(long)"),
            (long, "\(long)@\(long.dropLast())m"),
        ]
        let store = try MappingStore(path: state)
        for (pool, volume) in names { try store.save(document(pool, volume)) }
        let loaded = try store.load()
        #expect(loaded.damaged == [])
        #expect(Set(loaded.documents.map(\.name)) == Set(names.map { "\($0)/\($1)" }))
        #expect(MappingStore.file("pool", "volume") == "pool@volume.mapping", "short ones are what they were")
        for (pool, volume) in names { try store.remove(pool: pool, volume: volume) }
        #expect(try store.load().documents.isEmpty)
    }

    // MARK: Each stands for itself

    @Test func whatIsNoDocumentIsToldAndHindersNoOther() throws {
        let store = try MappingStore(path: state)
        try store.save(document())
        folder.write("state/pool@empty.mapping", "")
        folder.write("state/pool@damaged.mapping", "{")
        mkdir("\(state)/pool@folder.mapping", 0o700)
        mkfifo("\(state)/pool@fifo.mapping", 0o600)
        symlink("pool@volume.mapping", "\(state)/pool@link.mapping")
        symlink("pool@loop.mapping", "\(state)/pool@loop.mapping")
        let (documents, damaged) = try store.load()
        #expect(documents.map(\.name) == ["pool/volume"])
        #expect(damaged.count == 6)
        for name in ["empty", "damaged", "folder", "fifo", "link", "loop"] {
            #expect(damaged.contains { $0.contains("pool@\(name).mapping") && $0.contains("pool/\(name)") }, "\(name)")
        }
        // In the place of a FIFO there can be a document again.
        try store.save(document("pool", "fifo"))
        #expect(try store.load().documents.count == 2)
    }

    @Test func aFolderThatCannotBeReadIsNotEmpty() throws {
        let store = try MappingStore(path: state)
        try store.save(document())
        rename(state, state + ".away")
        folder.write("state", "")
        #expect(throws: BackendError.self) { try store.load() }
        #expect(throws: BackendError.self) { try Leftovers.find(store, root: folder.path) }
    }

    // MARK: Whose devices are ours

    private func device(_ index: Int, _ identifier: DeviceIdentifier) {
        for part in ["sys", "sys/block", "sys/block/nbd\(index)"] { mkdir("\(folder.path)/\(part)", 0o755) }
        folder.write("sys/block/nbd\(index)/backend", "\(identifier)\n")
        folder.write("sys/block/nbd\(index)/size", "2048\n")
    }

    @Test func aLostIDIsFoundAgain() throws {
        var identifier: DeviceIdentifier?
        do {
            let store = try MappingStore(path: state)
            identifier = store.newIdentifier(0, "pool/volume")
            try store.save(document(device: identifier))
        }
        let made = try #require(identifier)
        for damage in ["missing", "empty", "damaged"] {
            unlink("\(state)/id")
            if damage != "missing" { folder.write("state/id", damage == "empty" ? "" : "zzz\n") }
            #expect(try MappingStore(path: state).made(made), "\(damage)")
        }
        unlink("\(state)/id")
        mkdir("\(state)/id", 0o700)
        #expect(throws: BackendError.self, "unreadable: there is an id, and it may be any") {
            _ = try MappingStore(path: state)
        }
        rmdir("\(state)/id")
        mkfifo("\(state)/id", 0o600)
        #expect(throws: BackendError.self) { _ = try MappingStore(path: state) }
        unlink("\(state)/id")
        // The only document that would tell it is damaged.
        folder.write("state/pool@volume.mapping", "")
        #expect(throws: BackendError.self) { _ = try MappingStore(path: state) }
    }

    @Test func aMappingIsForgottenOnlyWhenItsDeviceIsKnownToBeGone() throws {
        let store = try MappingStore(path: state)
        let identifier = store.newIdentifier(0, "pool/volume")
        try store.save(document(device: identifier))
        try store.save(document("pool", "export"))

        // No /sys at all.
        var found = try Leftovers.find(store, root: folder.path)
        #expect(found.gone.isEmpty && Set(found.leftovers.keys) == ["pool/volume", "pool/export"])
        #expect(found.problems.count == 1)

        device(0, identifier)
        found = try Leftovers.find(store, root: folder.path)
        #expect(found.gone.isEmpty && found.leftovers["pool/volume"]?.size == 1 << 20 && found.problems.isEmpty)

        // Another device that cannot be looked at may be it.
        unlink("\(folder.path)/sys/block/nbd0/backend")
        mkdir("\(folder.path)/sys/block/nbd0/backend", 0o755)
        found = try Leftovers.find(store, root: folder.path)
        #expect(found.gone.isEmpty && found.leftovers["pool/volume"]?.isDevice == true)
        #expect(found.problems.count == 1)

        rmdir("\(folder.path)/sys/block/nbd0/backend")
        found = try Leftovers.find(store, root: folder.path)
        #expect(found.gone.map(\.name) == ["pool/volume"], "that is known to be gone")
    }

    @Test func aDeviceIsNoOrphanWhileADocumentCannotBeRead() throws {
        let store = try MappingStore(path: state)
        device(0, store.newIdentifier(0, "pool/volume"))
        #expect(try Leftovers.find(store, root: folder.path).orphanedDevices.count == 1)
        folder.write("state/pool@other.mapping", "")
        #expect(try Leftovers.find(store, root: folder.path).orphanedDevices.isEmpty)
    }

    // MARK: Flushes that fail

    @Test func thatFlushesFailIsAddedToWhatIsWritten() throws {
        let store = try MappingStore(path: state)
        try store.change(pool: "pool", volume: "volume") { $0.flushesFailSince = 1 }
        #expect(try store.load().documents.isEmpty, "what is not mapped stays so")
        try store.save(document())
        try store.change(pool: "pool", volume: "volume") { $0.flushesFailSince = 1_700_000_000 }
        #expect(try store.load().documents.first?.flushesFailSince == 1_700_000_000)
    }
}

/// A folder of its own.
private final class Folder: Sendable {
    let path: String

    init() throws {
        var template = Array("/tmp/qbd-state-XXXXXX".utf8CString)
        path = try #require(mkdtemp(&template).map { String(cString: $0) })
    }

    deinit { remove(path) }

    private func remove(_ path: String) {
        var status = stat()
        if lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFDIR, let directory = opendir(path) {
            while let entry = readdir(directory) {
                let name = withUnsafeBytes(of: &entry.pointee.d_name) {
                    String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
                }
                if name != ".", name != ".." { remove("\(path)/\(name)") }
            }
            closedir(directory)
        }
        Glibc.remove(path)
    }

    func write(_ name: String, _ text: String) {
        let file = fopen("\(path)/\(name)", "w")
        fwrite(text, 1, text.utf8.count, file)
        fclose(file)
    }
}
