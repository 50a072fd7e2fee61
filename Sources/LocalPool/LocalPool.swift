import Backend
import CLinux
import EventLoop
import Glibc
import Synchronization

/// Volumes as sparse files in a directory: `NAME.raw` holds the data, `NAME.volume` describes it. A volume exists
/// exactly when its description does: creating ends, and deleting begins, with that one rename. What a crash leaves
/// over has a name that begins with a tilde, which no volume's name holds, and the next look at the pool removes it.
package final class LocalPool: VolumePool {
    package let name: String
    let path: String
    /// For lines that belong in the log. From any thread.
    let report: @Sendable (String) -> Void
    private let reported = Mutex<Set<String>>([])

    /// - Parameters:
    ///   - path: absolute; the directory is made at first use when it is missing.
    ///   - report: takes lines for the log, on any thread.
    package init(name: String, path: String, report: @escaping @Sendable (String) -> Void = { _ in }) {
        self.name = name
        self.path = path
        self.report = report
    }

    /// What is found again at every look.
    func reportOnce(_ line: String) {
        // What an outsider writes into the pool may make any number of them.
        let isNews = reported.withLock { $0.count < 1000 && $0.insert(line).inserted }
        if isNews { report(line) }
    }

    static let describedBy = ".volume"
    private static let dataIn = ".raw"
    static let ours = "~"
    static let fresh = ".new"
    static let deleted = ".deleted"

    /// A small file whose space is used when there is none for the description that frees some.
    static let spare = "~spare"

    static func description(_ volume: String) -> String { volume + describedBy }
    /// The volume that a file describes; nil when it does not.
    static func volume(of file: String) -> String? {
        guard !file.hasPrefix(ours), !file.hasPrefix(Layer.prefix) else { return nil }
        return file.removing(suffix: describedBy).map { String($0) }
    }
    static func data(_ volume: String) -> String { volume + dataIn }

    func openDirectory() throws(BackendError) -> Directory {
        do throws(BackendError) { return try Directory(path: path) } catch {
            let remedy = error.code == ENOENT ? "make the directory above it first, or change" : "change"
            throw BackendError(
                code: error.code, message: "pool \(name): \(error.message); \(remedy) the path in [pool.\(name)]")
        }
    }

    // MARK: Create and delete

    package func create(volume: String, size: UInt64, blockSize: UInt32) throws(BackendError) -> VolumeRecord {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        try checkFree(directory, volume)
        try checkSize(size, volume)
        let record = VolumeRecord(
            id: try unusedID(directory), volume: volume, size: size, blockSize: blockSize, created: Int64(time(nil)))
        let freshData = Self.ours + Self.data(volume) + Self.fresh
        let freshDescription = Self.ours + Self.description(volume) + Self.fresh
        do {
            try makeSparse(directory, freshData, of: volume, size: size)
            try directory.write(VolumeDescription(record).encode(), to: freshDescription)
            try directory.renameNew(freshDescription, to: Self.description(volume))
            try directory.synchronize()
            // From here on the volume exists; a crash before this rename is mended by `recover`.
            try directory.renameNew(freshData, to: Self.data(volume))
            try directory.synchronize()
        } catch {
            recoverLater(directory)
            throw error
        }
        return record
    }

    /// EEXIST when a new volume cannot have the name.
    func checkFree(_ directory: borrowing Directory, _ volume: String) throws(BackendError) {
        guard try !directory.exists(Self.description(volume)) else {
            throw BackendError(code: EEXIST, message: "\(name)/\(volume) exists already")
        }
        guard try !directory.exists(Self.data(volume)) else {
            throw BackendError(
                code: EEXIST,
                message: "\(path)/\(Self.data(volume)) is in the way and belongs to no volume; move it away")
        }
    }

    /// EFBIG when no volume is so large.
    func checkSize(_ size: UInt64, _ volume: String) throws(BackendError) {
        guard size > Layer.maximumSize else { return }
        throw BackendError(
            code: EFBIG,
            message:
                "\(name)/\(volume) cannot have \(size) bytes; a volume of a local pool has at most \(Layer.maximumSize)"
        )
    }

    private func makeSparse(
        _ directory: borrowing Directory, _ file: String, of volume: String, size: UInt64
    ) throws(BackendError) {
        let data = try directory.createAnew(file)
        defer { Glibc.close(data) }
        let made = LayerFile(descriptor: data, path: "\(path)/\(file)")
        do throws(BackendError) { try made.extend(to: size) } catch { throw failed(volume, error) }
        try made.synchronize()
    }

    /// - Parameter volume: what a file was to be changed for.
    func failed(_ volume: String, _ error: BackendError) -> BackendError {
        let remedy =
            error.code == EFBIG ? "; the file system of the pool holds no file so large, make the volume smaller" : ""
        return BackendError(code: error.code, message: "\(name)/\(volume): \(error)\(remedy)")
    }

    /// For a volume or a snapshot.
    func unusedID(_ directory: borrowing Directory) throws(BackendError) -> UInt64 {
        var used: Set<UInt64> = []
        for description in try descriptions(directory) {
            used.insert(description.record.id)
            used.formUnion(description.snapshots.map(\.record.id))
        }
        while true {
            let id = UInt64.random(in: 1..<(1 << 38)) << 24
            if !used.contains(id) { return id }
        }
    }

    package func delete(volume: String, snapshots: Bool, force: Bool) throws(BackendError) {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        guard try directory.exists(Self.description(volume)) else { throw missing(volume) }
        let description: VolumeDescription
        // Held until the end: nobody can open what is going away.
        let locks: [Int32]
        do throws(BackendError) {
            description = try describe(directory, volume)
            guard snapshots || description.snapshots.isEmpty else {
                let names = description.snapshots.map(\.record.name)
                throw BackendError(
                    code: EBUSY,
                    message: "\(name)/\(volume) has \(names.count) snapshot\(names.count == 1 ? "" : "s") "
                        + "(\(names.prefix(4).joined(separator: ", "))); delete them first, or add --snapshots")
            }
            locks = try lockAll(directory, description)
        } catch {
            guard error.code != EBUSY else { throw error }
            return try deleteDamaged(directory, volume, error, force: force)
        }
        defer { for lock in locks { Glibc.close(lock) } }
        guard description.head != nil else { return try removeDescription(directory, volume) }
        try changing(directory) { (directory) throws(BackendError) in try removeDescription(directory, volume) }
    }

    private func removeDescription(_ directory: borrowing Directory, _ volume: String) throws(BackendError) {
        try directory.rename(Self.description(volume), to: Self.ours + Self.description(volume) + Self.deleted)
        try directory.synchronize()
        // The volume is gone; its data, where it had a file of its own, now or with the next look at the pool.
        do throws(BackendError) { try finishInterrupted(directory, try directory.names()) } catch {
            report("\(name)/\(volume) is deleted, and its data is left to be removed later: \(error.message)")
        }
    }

    /// Deletes a volume that cannot be read. Its data, where there may be some, goes only when that is wanted; layers that
    /// nobody else needs are moved aside.
    private func deleteDamaged(
        _ directory: borrowing Directory, _ volume: String, _ damage: BackendError, force: Bool
    ) throws(BackendError) {
        guard force else {
            throw BackendError(
                code: damage.code,
                message: "\(name)/\(volume) cannot be read, and is not deleted, since its data may be good"
                    + " (\(damage.message)); --force deletes it all the same")
        }
        let data = Self.data(volume)
        var lock: Int32?
        if let status = try directory.status(of: data), status.st_mode & S_IFMT == S_IFREG {
            lock = try openData(directory, volume, readOnly: true, exclusive: true)
        }
        defer { if let lock { Glibc.close(lock) } }
        report("\(name)/\(volume) is deleted though it cannot be read: \(damage.message)")
        try placeMarker(directory)
        try removeDescription(directory, volume)
        recoverLater(directory)
    }

    /// The data of a volume and of its snapshots, locked.
    private func lockAll(
        _ directory: borrowing Directory, _ description: VolumeDescription
    ) throws(BackendError) -> [Int32] {
        let volume = description.record.volume
        guard let head = description.head else { return [try openData(directory, volume, readOnly: false)] }
        var locks: [Int32] = []
        do throws(BackendError) {
            locks.append(try lockLayer(directory, head, of: volume))
            for snapshot in description.snapshots {
                locks.append(try lockLayer(directory, snapshot.layer, of: "\(volume)@\(snapshot.record.name)"))
            }
        } catch {
            for lock in locks { Glibc.close(lock) }
            throw error
        }
        return locks
    }

    /// After a change that failed: what it left is removed now, or by the next look at the pool. It decides nothing about
    /// the change.
    func recoverLater(_ directory: borrowing Directory) {
        do throws(BackendError) { try recover(directory) } catch {
            report("pool \(name): left to be cleared up later: \(error.message)")
        }
    }

    /// Finishes what a crash interrupted. Called under the pool's lock.
    /// - Returns: whether nothing is left that time has to pass for.
    @discardableResult
    func recover(_ directory: borrowing Directory) throws(BackendError) -> Bool {
        let names = try directory.names().filter { $0.hasPrefix(Self.ours) }
        try finishInterrupted(directory, names)
        let isClear = try removeAside(directory, names)
        guard try directory.exists(Self.marker) else { return isClear }
        try removeNeedless(directory, after: nil)
        return false
    }

    /// Creating and deleting volumes, and drafts of small files.
    private func finishInterrupted(_ directory: borrowing Directory, _ names: [String]) throws(BackendError) {
        var changed = false
        for ours in names where ours.hasPrefix(Self.ours) && !ours.hasPrefix(Self.aside) {
            let file = ours.dropFirst()
            if let data = file.removing(suffix: Self.dataIn + Self.fresh) {
                let volume = String(data)
                if try directory.exists(Self.description(volume)), try !directory.exists(Self.data(volume)) {
                    try directory.renameNew(ours, to: Self.data(volume))
                } else {
                    try directory.remove(ours)
                }
                changed = true
            } else if file.hasSuffix(Self.describedBy + Self.fresh) {
                try directory.remove(ours)
                changed = true
            } else if let gone = file.removing(suffix: Self.describedBy + Self.deleted) {
                let volume = String(gone)
                if try !directory.exists(Self.description(volume)) { try directory.remove(Self.data(volume)) }
                try directory.synchronize()
                try directory.remove(ours)
                changed = true
            } else if file.hasPrefix(Layer.prefix) {
                try directory.remove(ours)
                changed = true
            }
        }
        if changed { try directory.synchronize() }
    }

    /// Locks the pool for who changes nothing, and finishes what a crash interrupted where that can be.
    /// - Returns: what to close.
    private func lockToRead(_ directory: borrowing Directory) throws(BackendError) -> Int32? {
        let (lock, isReadOnly) = try directory.lockForReading()
        if isReadOnly { return lock }
        do throws(BackendError) { try recover(directory) } catch {
            // It hinders who wants to change something, and nobody else.
            reportOnce("pool \(name): what an earlier change left cannot be cleared up: \(error.message)")
        }
        return lock
    }

    // MARK: List and open

    package func list() throws(BackendError) -> [VolumeRecord] {
        let directory = try openDirectory()
        // Without a lock, where nothing has to be finished.
        let names = try directory.names().filter {
            $0.hasPrefix(Self.ours) && $0 != Directory.lockFile && $0 != Self.spare
        }
        let lock = names.isEmpty ? nil : try lockToRead(directory)
        defer { if let lock { Glibc.close(lock) } }
        return try descriptions(directory).map(\.record)
    }

    package func damaged() throws(BackendError) -> [DamagedVolume] {
        let directory = try openDirectory()
        // Nobody is waited for where all is well. What a change under way makes look damaged is looked at again.
        if try tree(directory).isWhole { return [] }
        let lock = try lockToRead(directory)
        defer { if let lock { Glibc.close(lock) } }
        return try tree(directory).damaged
    }

    package func space() throws(BackendError) -> PoolSpace? {
        var status = statvfs()
        do throws(SystemError) { try retrying("look at the file system of \(path)") { statvfs(path, &status) } } catch {
            // Nobody has used the pool yet.
            if error.code == ENOENT { return nil }
            throw BackendError(error)
        }
        let block = UInt64(status.f_frsize)
        // What is reserved for root counts as much as root can take of it.
        let free = geteuid() == 0 ? status.f_bfree : status.f_bavail
        return PoolSpace(
            total: UInt64(status.f_blocks).multipliedReportingOverflow(by: block).partialValue,
            free: UInt64(free).multipliedReportingOverflow(by: block).partialValue)
    }

    /// The descriptions that can be read, by name.
    private func descriptions(_ directory: borrowing Directory) throws(BackendError) -> [VolumeDescription] {
        var readable: [VolumeDescription] = []
        for volume in try directory.names().compactMap(Self.volume(of:)) {
            // One that is gone since the directory was read, or damaged, is not listed.
            do throws(BackendError) { readable.append(try describe(directory, volume)) } catch {}
        }
        return readable.sorted { $0.record.volume < $1.record.volume }
    }

    func describe(_ directory: borrowing Directory, _ volume: String) throws(BackendError) -> VolumeDescription {
        let file = Self.description(volume)
        let bytes: [UInt8]
        do throws(BackendError) { bytes = try directory.read(file) } catch {
            throw error.code == ENOENT ? missing(volume) : error
        }
        return try VolumeDescription.decode(bytes, volume: volume, file: "\(path)/\(file)")
    }

    package func open(volume: String, readOnly: Bool) throws(BackendError) -> any OpenVolume {
        let directory = try openDirectory()
        guard !readOnly, !volume.contains("@") else {
            let lock = try lockToRead(directory)
            defer { if let lock { Glibc.close(lock) } }
            return try open(directory, volume, readOnly: true)
        }
        let lock: Int32
        do throws(BackendError) { lock = try directory.lock() } catch {
            guard error.code == EROFS else { throw error }
            throw BackendError(
                code: EROFS,
                message: "\(name)/\(volume): \(path) can only be read; map the volume read-only")
        }
        defer { Glibc.close(lock) }
        try recover(directory)
        return try open(directory, volume, readOnly: false)
    }

    /// Called under the pool's lock.
    func open(
        _ directory: borrowing Directory, _ volume: String, readOnly: Bool
    ) throws(BackendError) -> any OpenVolume {
        if let at = volume.firstIndex(of: "@") {
            return try openSnapshot(
                directory, String(volume[..<at]), String(volume[volume.index(after: at)...]))
        }
        let description = try describe(directory, volume)
        let record = description.record
        if let head = description.head {
            return try openChain(directory, to: head, record: record, readOnly: readOnly)
        }
        return try openPlain(directory, record, readOnly: readOnly)
    }

    func openPlain(
        _ directory: borrowing Directory, _ record: VolumeRecord, readOnly: Bool
    ) throws(BackendError) -> LocalOpenVolume {
        let volume = record.volume
        let data = try openData(directory, volume, readOnly: readOnly)
        do throws(BackendError) {
            let length = try LayerFile(descriptor: data, path: "\(path)/\(Self.data(volume))").length()
            guard length >= record.size else {
                throw BackendError(
                    code: EIO,
                    message: "\(path)/\(Self.data(volume)) has \(length) bytes, its description says "
                        + "\(record.size); data is missing, restore the file")
            }
        } catch {
            Glibc.close(data)
            throw error
        }
        return LocalOpenVolume(pool: self, record: record, descriptor: data, readOnly: readOnly)
    }

    /// Opens the data file and locks it: one user that writes, or any number that only read.
    /// - Parameter exclusive: locks it against everybody, though it is only read.
    func openData(
        _ directory: borrowing Directory, _ volume: String, readOnly: Bool, exclusive: Bool = false
    ) throws(BackendError) -> Int32 {
        let data = try directory.open(Self.data(volume), readOnly ? O_RDONLY : O_RDWR)
        let file = LayerFile(descriptor: data, path: "\(path)/\(Self.data(volume))")
        do throws(BackendError) {
            if try file.lock(readOnly && !exclusive ? LOCK_SH : LOCK_EX) { return data }
            throw BackendError(
                code: EBUSY, message: "\(name)/\(volume) is in use (\(file.path) is locked); unmap it first")
        } catch {
            Glibc.close(data)
            throw error
        }
    }

    func missing(_ volume: String) -> BackendError {
        BackendError(
            code: ENOENT, message: "no volume \(volume) in pool \(name); `qbd volumes \(name)` lists what there is")
    }
}

extension StringProtocol {
    /// The rest in front of a suffix; nil where there is no such suffix or nothing before it.
    fileprivate func removing(suffix: String) -> SubSequence? {
        guard hasSuffix(suffix), utf8.count > suffix.utf8.count else { return nil }
        return dropLast(suffix.count)
    }
}
