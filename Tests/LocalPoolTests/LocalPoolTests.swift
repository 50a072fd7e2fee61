import Backend
import Glibc
import LocalPool
import Testing

/// A directory of its own for a test.
final class TemporaryDirectory {
    let path: String
    init() throws {
        var template = Array("/tmp/qbd-pool-XXXXXX".utf8CString)
        path = try #require(mkdtemp(&template).map { String(cString: $0) })
    }
    deinit {
        for name in names { unlink("\(path)/\(name)") }
        rmdir(path)
    }
    var names: [String] {
        guard let directory = opendir(path) else { return [] }
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }
    func write(_ name: String, _ text: String) {
        let file = fopen("\(path)/\(name)", "w")
        fputs(text, file)
        fclose(file)
    }
    func read(_ name: String) throws -> [UInt8] {
        let file = try #require(fopen("\(path)/\(name)", "r"))
        defer { fclose(file) }
        var bytes = [UInt8](repeating: 0, count: size(name))
        #expect(fread(&bytes, 1, bytes.count, file) == bytes.count)
        return bytes
    }
    func size(_ name: String) -> Int {
        var status = stat()
        return stat("\(path)/\(name)", &status) == 0 ? Int(status.st_size) : -1
    }
}

private func code(_ body: () throws(BackendError) -> Void) -> Int32 {
    do {
        try body()
        return 0
    } catch { return error.code }
}

@Suite struct LocalPoolTests {
    let directory: TemporaryDirectory
    let pool: LocalPool

    init() throws {
        directory = try TemporaryDirectory()
        pool = LocalPool(name: "p", path: directory.path)
    }

    @Test func aVolumeIsASparseFileAndItsDescription() throws {
        let record = try pool.create(volume: "disk", size: 1 << 30, blockSize: 4096)
        #expect(directory.names == ["disk.raw", "disk.volume", "~lock"])
        #expect(directory.size("disk.raw") == 1 << 30)
        #expect(record.id % (1 << 24) == 0 && record.id > 0)
        #expect(try pool.list() == [record])
    }

    @Test func namesThatLookLikeFilesOfThePoolDoNotCollide() throws {
        let names = ["x", "x.volume", "x.raw", ".hidden", "x.raw.new"]
        for name in names { _ = try pool.create(volume: name, size: 512, blockSize: 512) }
        #expect(try pool.list().map(\.volume) == names.sorted())
        for name in names { try pool.open(volume: name, readOnly: false).close() }
        for name in names { try pool.delete(volume: name, snapshots: false) }
        #expect(directory.names == ["~lock"])
    }

    @Test func creatingTwiceFailsAndLeavesTheFirst() throws {
        let record = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        #expect(
            code { () throws(BackendError) in _ = try pool.create(volume: "disk", size: 8192, blockSize: 512) }
                == EEXIST)
        #expect(try pool.list() == [record])
        #expect(directory.size("disk.raw") == 4096)
    }

    @Test func aForeignDataFileIsNeverTaken() throws {
        directory.write("disk.raw", "precious")
        #expect(
            code { () throws(BackendError) in _ = try pool.create(volume: "disk", size: 4096, blockSize: 512) }
                == EEXIST)
        #expect(try pool.list().isEmpty)
        #expect(directory.size("disk.raw") == 8)
    }

    @Test func onlyOneMayWriteAndManyMayRead() throws {
        _ = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        let writer = try pool.open(volume: "disk", readOnly: false)
        #expect(
            code { () throws(BackendError) in _ = try pool.open(volume: "disk", readOnly: true) } == EBUSY)
        #expect(
            code { () throws(BackendError) in try pool.delete(volume: "disk", snapshots: false) } == EBUSY)
        writer.close()
        let first = try pool.open(volume: "disk", readOnly: true)
        let second = try pool.open(volume: "disk", readOnly: true)
        #expect(
            code { () throws(BackendError) in _ = try pool.open(volume: "disk", readOnly: false) } == EBUSY)
        first.close()
        second.close()
        try pool.delete(volume: "disk", snapshots: false)
        #expect(
            code { () throws(BackendError) in try pool.delete(volume: "disk", snapshots: false) } == ENOENT)
    }

    @Test func aVolumeGrowsByZeros() throws {
        let record = try pool.create(volume: "disk", size: 8192, blockSize: 4096)
        let grown = try pool.grow(volume: "disk", to: 65536)
        #expect(grown == record.resized(to: 65536))
        #expect(try pool.list() == [grown])
        #expect(directory.size("disk.raw") == 65536)
        #expect(directory.names == ["disk.raw", "disk.volume", "~lock"])
    }

    @Test(arguments: [(8192, "8192 bytes are the same"), (4096, "4096 bytes are less"), (12288 + 512, "block size")])
    func aVolumeThatCannotGrowSaysWhy(size: UInt64, text: String) throws {
        let record = try pool.create(volume: "disk", size: 8192, blockSize: 4096)
        do {
            _ = try pool.grow(volume: "disk", to: size)
            Issue.record("grown")
        } catch {
            #expect(error.code == EINVAL)
            #expect(error.message.contains(text))
        }
        #expect(try pool.list() == [record])
        #expect(directory.size("disk.raw") == 8192)
    }

    /// What does not fit an offset of a file up to a whole cluster.
    @Test(arguments: [UInt64(Int64.max) - 511, UInt64(Int64.max) - 65535 + 512]) func noVolumeIsLargerThanItsFiles(
        size: UInt64
    )
        throws
    {
        #expect(
            code { () throws(BackendError) in _ = try pool.create(volume: "large", size: size, blockSize: 512) }
                == EFBIG)
        let record = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        #expect(code { () throws(BackendError) in _ = try pool.grow(volume: "disk", to: size) } == EFBIG)
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        #expect(code { () throws(BackendError) in _ = try pool.grow(volume: "disk", to: size) } == EFBIG)
        #expect(try pool.list() == [record])
        let text = try String(decoding: directory.read("disk.volume"), as: UTF8.self)
        for damaged in [
            text.replacing(" 4096 ", with: " \(size) "), text.replacing("size = 4096", with: "size = \(size)"),
        ] {
            #expect(damaged != text)
            directory.write("disk.volume", damaged)
            #expect(code { () throws(BackendError) in _ = try pool.open(volume: "disk", readOnly: false) } == EIO)
        }
    }

    @Test func anOpenVolumeIsGrownByWhoHasItOpen() throws {
        _ = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        let open = try pool.open(volume: "disk", readOnly: false)
        #expect(code { () throws(BackendError) in _ = try pool.grow(volume: "disk", to: 8192) } == EBUSY)
        #expect(try open.grow(to: 8192).size == 8192)
        #expect(open.record.size == 8192)
        open.close()
        let reader = try pool.open(volume: "disk", readOnly: true)
        #expect(code { () throws(BackendError) in _ = try reader.grow(to: 16384) } == EROFS)
        #expect(try reader.grow(to: nil).size == 8192)
        reader.close()
    }

    @Test func theSizeOfTheDataFileIsTakenOver() throws {
        _ = try pool.create(volume: "disk", size: 8192, blockSize: 4096)
        #expect(try pool.grow(volume: "disk", to: nil).size == 8192)
        truncate("\(directory.path)/disk.raw", 20000)
        #expect(try pool.grow(volume: "disk", to: nil).size == 16384)
        #expect(directory.size("disk.raw") == 20000)
    }

    @Test func growingThatDiedBeforeTheDescriptionNeverWas() throws {
        let record = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        directory.write("disk.raw", String(repeating: "x", count: 8192))
        directory.write("~disk.volume.new", "half")
        #expect(try pool.list() == [record])
        try pool.open(volume: "disk", readOnly: false).close()
        // What lay behind the end does not show up when the volume grows.
        #expect(try pool.grow(volume: "disk", to: 8192).size == 8192)
        let file = fopen("\(directory.path)/disk.raw", "r")
        defer { fclose(file) }
        fseek(file, 4096, SEEK_SET)
        #expect((0..<4096).allSatisfy { _ in fgetc(file) == 0 })
        #expect(directory.names == ["disk.raw", "disk.volume", "~lock"])
    }

    @Test func aVolumeInMemoryGrows() throws {
        let memory = MemoryPool(name: "m")
        _ = try memory.create(volume: "disk", size: 4096, blockSize: 512)
        let open = try memory.open(volume: "disk", readOnly: false)
        #expect(code { () throws(BackendError) in _ = try memory.grow(volume: "disk", to: 8192) } == EBUSY)
        #expect(try open.grow(to: 1 << 30).size == 1 << 30)
        #expect(code { () throws(BackendError) in _ = try open.grow(to: 1 << 50) } == ENOMEM)
        #expect(memory.list().map(\.size) == [1 << 30])
        open.close()
    }

    // What each step of creating and deleting leaves behind when the daemon dies right after it.

    @Test func creatingThatDiedBeforeItsDescriptionNeverWas() throws {
        directory.write("~disk.raw.new", "")
        directory.write("~disk.volume.new", "half")
        #expect(try pool.list().isEmpty)
        _ = try pool.create(volume: "other", size: 512, blockSize: 512)
        #expect(directory.names == ["other.raw", "other.volume", "~lock"])
    }

    @Test func creatingThatDiedAfterItsDescriptionIsFinished() throws {
        let record = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        rename("\(directory.path)/disk.raw", "\(directory.path)/~disk.raw.new")
        #expect(try pool.list() == [record])
        try pool.open(volume: "disk", readOnly: false).close()
        #expect(directory.names == ["disk.raw", "disk.volume", "~lock"])
    }

    @Test func deletingThatDiedIsFinished() throws {
        _ = try pool.create(volume: "disk", size: 4096, blockSize: 512)
        rename("\(directory.path)/disk.volume", "\(directory.path)/~disk.volume.deleted")
        #expect(try pool.list().isEmpty)
        _ = try pool.create(volume: "disk", size: 512, blockSize: 512)
        #expect(directory.names == ["disk.raw", "disk.volume", "~lock"])
        #expect(directory.size("disk.raw") == 512)
    }

    @Test(arguments: [
        "", "version = 1\n", "nonsense", "version = 2\nid = 1\nsize = 512\nblock_size = 512\ncreated = 0\n",
    ])
    func aDamagedDescriptionIsNamed(text: String) throws {
        directory.write("disk.raw", "")
        directory.write("disk.volume", text)
        do {
            _ = try pool.open(volume: "disk", readOnly: false)
            Issue.record("opened")
        } catch { #expect(error.message.contains("disk.volume")) }
    }

    @Test func aDataFileThatIsTooShortIsNotServed() throws {
        _ = try pool.create(volume: "disk", size: 8192, blockSize: 512)
        truncate("\(directory.path)/disk.raw", 4096)
        #expect(
            code { () throws(BackendError) in _ = try pool.open(volume: "disk", readOnly: false) } == EIO)
    }

    @Test func aLinkIsNotFollowed() throws {
        _ = try pool.create(volume: "disk", size: 512, blockSize: 512)
        unlink("\(directory.path)/disk.raw")
        symlink("/etc/passwd", "\(directory.path)/disk.raw")
        #expect(
            code { () throws(BackendError) in _ = try pool.open(volume: "disk", readOnly: false) } == ELOOP)
    }
}
