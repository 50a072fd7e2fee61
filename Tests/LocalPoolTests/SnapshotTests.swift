import Backend
import Glibc
import LocalPool
import Testing

private func code(_ body: () throws(BackendError) -> Void) -> Int32 {
    do {
        try body()
        return 0
    } catch { return error.code }
}

/// The files of snapshots and clones, and what a crash leaves of them. What is read and written through them is tested
/// with the daemon.
@Suite struct SnapshotTests {
    let directory: TemporaryDirectory
    let pool: LocalPool
    static let plain = ["disk.raw", "disk.volume", "~lock"]

    init() throws {
        directory = try TemporaryDirectory()
        pool = LocalPool(name: "p", path: directory.path)
        _ = try pool.create(volume: "disk", size: 100_352, blockSize: 512)
    }

    private func tidy() throws { while try pool.tidy(stop: { false }).changed {} }

    @Test func aSnapshotPutsALayerOnTheData() throws {
        let snapshot = try pool.createSnapshot(volume: "disk", snapshot: "s")
        #expect(try pool.snapshots(volume: "disk") == [snapshot])
        #expect(snapshot.size == 100_352)
        let layers = directory.names.filter { $0.hasPrefix("@") }
        #expect(layers.count == 4, "two layers of two files: \(directory.names)")
        #expect(!directory.names.contains("disk.raw"))
        #expect(layers.filter { $0.hasSuffix(".raw") }.allSatisfy { directory.size($0) == 131_072 })
    }

    @Test func withTheLastSnapshotTheLayersGo() throws {
        let names = (0..<5).map { "s\($0)" }
        for name in names { _ = try pool.createSnapshot(volume: "disk", snapshot: name) }
        for name in ["s3", "s0", "s4", "s1", "s2"] {
            try pool.deleteSnapshot(volume: "disk", snapshot: name)
            try tidy()
            try pool.open(volume: "disk", readOnly: false).close()
        }
        #expect(directory.names == Self.plain)
        #expect(directory.size("disk.raw") == 100_352)
    }

    @Test func whatIsOpenIsLeftAlone() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        let reader = try pool.open(volume: "disk@s", readOnly: true)
        #expect(reader.readOnly)
        #expect(code { () throws(BackendError) in try pool.deleteSnapshot(volume: "disk", snapshot: "s") } == EBUSY)
        #expect(code { () throws(BackendError) in try pool.delete(volume: "disk", snapshots: true) } == EBUSY)
        reader.close()
        let writer = try pool.open(volume: "disk", readOnly: false)
        #expect(code { () throws(BackendError) in try pool.rollback(volume: "disk", snapshot: "s") } == EBUSY)
        #expect(code { () throws(BackendError) in _ = try pool.createSnapshot(volume: "disk", snapshot: "t") } == EBUSY)
        try pool.deleteSnapshot(volume: "disk", snapshot: "s")
        let outcome = try pool.tidy(stop: { false })
        #expect(!outcome.changed, "the head is open")
        #expect(outcome.isLeft)
        #expect(try writer.dueChange() == .tidy)
        let change = try writer.prepare(.tidy) { nil }
        let tidied = try change.apply(Hold())
        writer.close()
        try change.finish()
        #expect(try tidied.dueChange() == nil)
        tidied.close()
        #expect(directory.names == Self.plain)
    }

    /// A plain volume's data is made longer for its first snapshot, and must not stay so: `grow` would take that over.
    @Test(arguments: [false, true]) func aChangeThatIsGivenUpLeavesNothing(withSnapshots: Bool) throws {
        if withSnapshots { _ = try pool.createSnapshot(volume: "disk", snapshot: "first") }
        let files = directory.names
        let snapshots = try pool.snapshots(volume: "disk")
        let writer = try pool.open(volume: "disk", readOnly: false)
        let change = try writer.prepare(.snapshot("s")) { nil }
        #expect(directory.names != files, "what is needed is made before I/O is held back")
        let hold = Hold()
        #expect(hold.giveUp(BackendError(code: ETIMEDOUT, message: "late")))
        #expect(code { () throws(BackendError) in _ = try change.apply(hold) } == ETIMEDOUT)
        writer.changeGivenUp()
        try change.finish()
        #expect(directory.names == files)
        #expect(try pool.snapshots(volume: "disk") == snapshots)
        #expect(try writer.grow(to: nil).size == 100_352)
        if !withSnapshots { #expect(directory.size("disk.raw") == 100_352) }
        writer.close()
    }

    @Test func aChangeThatIsCommittedIsNotGivenUp() throws {
        let hold = Hold()
        try hold.commit()
        #expect(!hold.giveUp(BackendError(code: ETIMEDOUT, message: "late")))
    }

    @Test func aLockThatSomebodyHasIsWaitedForUntilThatIsGivenUp() throws {
        let writer = try pool.open(volume: "disk", readOnly: false)
        let lock = open("\(directory.path)/~lock", O_RDWR)
        #expect(flock(lock, LOCK_EX) == 0)
        var asked = 0
        let result = code { () throws(BackendError) in
            _ = try writer.prepare(.snapshot("s")) {
                asked += 1
                return asked > 3 ? BackendError(code: ECANCELED, message: "enough") : nil
            }
        }
        #expect(result == ECANCELED)
        close(lock)
        writer.close()
    }

    /// Read before a change and not after it: that is no reason to take its layers for needless.
    @Test func layersOfWhatCannotBeReadAreKept() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        _ = try pool.create(volume: "other", size: 512, blockSize: 512)
        _ = try pool.createSnapshot(volume: "other", snapshot: "s")
        rename("\(directory.path)/disk.volume", "\(directory.path)/saved")
        directory.write("disk.volume", "")
        let files = directory.names.filter { $0.hasPrefix("@") }
        _ = try pool.createSnapshot(volume: "other", snapshot: "t")
        try pool.deleteSnapshot(volume: "other", snapshot: "s")
        try tidy()
        #expect(try pool.damaged().map(\.volume) == ["disk"])
        #expect(try pool.list().map(\.volume) == ["other"])
        rename("\(directory.path)/saved", "\(directory.path)/disk.volume")
        #expect(try pool.damaged().isEmpty)
        try pool.open(volume: "disk@s", readOnly: true).close()
        try pool.open(volume: "disk", readOnly: false).close()
        #expect(!files.isEmpty)
    }

    @Test func aVolumeWithSnapshotsIsNotDeletedByMistake() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        #expect(code { () throws(BackendError) in try pool.delete(volume: "disk", snapshots: false) } == EBUSY)
        try pool.delete(volume: "disk", snapshots: true)
        #expect(directory.names == ["~lock"])
    }

    @Test func aCloneKeepsWhatItNeeds() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        let clone = try pool.clone(volume: "disk", snapshot: "s", to: "clone")
        #expect(try pool.list().map(\.volume) == ["clone", "disk"])
        #expect(
            code { () throws(BackendError) in _ = try pool.clone(volume: "disk", snapshot: "s", to: "clone") } == EEXIST
        )
        try pool.delete(volume: "disk", snapshots: true)
        try tidy()
        #expect(directory.names == ["clone.raw", "clone.volume", "~lock"])
        #expect(try pool.list() == [clone])
    }

    /// Gives the state of a snapshot more names, as many as fit a description of so many bytes.
    private func describe(bytes: Int) throws {
        var text = String(decoding: try directory.read("disk.volume"), as: UTF8.self)
        let line = try #require(text.split(separator: "\n").first { $0.hasPrefix("snapshot = s ") })
        var number = 100_000
        while true {
            let name = String(repeating: "x", count: 122) + String(number)
            let another = line.replacing(" s ", with: " \(name) ") + "\n"
            guard text.utf8.count + another.utf8.count <= bytes else { break }
            text += another
            number += 1
        }
        directory.write("disk.volume", text)
    }

    @Test func aLongDescriptionIsReadToItsEnd() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        try describe(bytes: 200 << 10)
        let names = try pool.snapshots(volume: "disk").map(\.name)
        #expect(names.count > 900)
        _ = try pool.createSnapshot(volume: "disk", snapshot: "t")
        #expect(try pool.snapshots(volume: "disk").map(\.name) == names + ["t"])
    }

    @Test func aDescriptionThatIsFullTakesNoOtherSnapshot() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        try describe(bytes: 1 << 20)
        let (files, size) = (directory.names, directory.size("disk.volume"))
        do {
            _ = try pool.createSnapshot(volume: "disk", snapshot: String(repeating: "t", count: 128))
            Issue.record("made")
        } catch {
            #expect(error.code == EMLINK)
            #expect(error.message.contains("snapshots"))
        }
        #expect(directory.names == files)
        #expect(directory.size("disk.volume") == size)
        try pool.open(volume: "disk", readOnly: false).close()
    }

    @Test func aDescriptionThatIsTooLongIsRefusedAsAWhole() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        try describe(bytes: 2 << 20)
        directory.write("~layers", "")
        let files = directory.names
        do {
            _ = try pool.open(volume: "disk", readOnly: false)
            Issue.record("opened")
        } catch {
            #expect(error.code == EFBIG)
            #expect(error.message.contains("disk.volume"))
        }
        #expect(directory.names == files)
    }

    @Test func aForeignFileInTheWayIsKept() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        directory.write("disk.raw", "precious")
        try pool.deleteSnapshot(volume: "disk", snapshot: "s")
        #expect(code { () throws(BackendError) in _ = try pool.tidy(stop: { false }) } == EEXIST)
        #expect(directory.size("disk.raw") == 8)
        unlink("\(directory.path)/disk.raw")
        try tidy()
        #expect(directory.names == Self.plain)
    }

    @Test func aMissingOrDamagedLayerIsNamedAndNothingIsRemoved() throws {
        _ = try pool.createSnapshot(volume: "disk", snapshot: "s")
        _ = try pool.create(volume: "other", size: 512, blockSize: 512)
        let map = try #require(directory.names.first { $0.hasSuffix(".map") })
        rename("\(directory.path)/\(map)", "\(directory.path)/away")
        directory.write("~layers", "")
        let before = directory.names
        do {
            _ = try pool.open(volume: "disk", readOnly: false)
            Issue.record("opened")
        } catch { #expect(error.message.contains("@")) }
        try pool.open(volume: "other", readOnly: false).close()
        #expect(directory.names == before)
        rename("\(directory.path)/away", "\(directory.path)/\(map)")
        try pool.open(volume: "disk", readOnly: false).close()
        #expect(!directory.names.contains("~layers"))
    }
}
