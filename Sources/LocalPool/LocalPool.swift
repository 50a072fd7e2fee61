import Backend
import CLinux
import EventLoop
import Glibc

/// Volumes as sparse files in a directory: `NAME.raw` holds the data, `NAME.volume` describes it. A volume exists
/// exactly when its description does: creating ends, and deleting begins, with that one rename. What a crash leaves
/// over has a name that begins with a tilde, which no volume's name holds, and the next look at the pool removes it.
package final class LocalPool: VolumePool {
    package let name: String
    let path: String

    /// - Parameter path: absolute; the directory is made at first use when it is missing.
    package init(name: String, path: String) {
        self.name = name
        self.path = path
    }

    static let describedBy = ".volume"
    private static let dataIn = ".raw"
    static let ours = "~"
    static let fresh = ".new"
    static let deleted = ".deleted"

    static func description(_ volume: String) -> String { volume + describedBy }
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
            try directory.rename(freshDescription, to: Self.description(volume))
            try directory.synchronize()
            // From here on the volume exists; a crash before this rename is mended by `recover`.
            try directory.rename(freshData, to: Self.data(volume))
            try directory.synchronize()
        } catch {
            try recover(directory)
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
        let data = try directory.open(file, O_RDWR | O_CREAT | O_TRUNC)
        defer { Glibc.close(data) }
        do throws(SystemError) {
            try retrying("make \(path)/\(file) \(size) bytes long") { ftruncate(data, off_t(size)) }
            try retrying("synchronize \(path)/\(file)") { fsync(data) }
        } catch { throw failed(volume, error) }
    }

    /// - Parameter volume: what a file was to be changed for.
    func failed(_ volume: String, _ error: SystemError) -> BackendError {
        let remedy =
            error.code == EFBIG ? "; the file system of the pool holds no file so large, make the volume smaller" : ""
        return BackendError(code: error.code, message: "\(name)/\(volume): \(error)\(remedy)")
    }

    /// For a volume or a snapshot.
    func unusedID(_ directory: borrowing Directory) throws(BackendError) -> UInt64 {
        var used: Set<UInt64> = []
        for volume in try records(directory).map(\.volume) {
            let description = try describe(directory, volume)
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
        let description = try describe(directory, volume)
        guard snapshots || description.snapshots.isEmpty else {
            let names = description.snapshots.map(\.record.name)
            throw BackendError(
                code: EBUSY,
                message: "\(name)/\(volume) has \(names.count) snapshot\(names.count == 1 ? "" : "s") "
                    + "(\(names.prefix(4).joined(separator: ", "))); delete them first, or add --snapshots")
        }
        // Held until the end: nobody can open what is going away.
        let locks = try lockAll(directory, description)
        defer { for lock in locks { Glibc.close(lock) } }
        if description.head != nil { try placeMarker(directory) }
        try directory.rename(Self.description(volume), to: Self.ours + Self.description(volume) + Self.deleted)
        try directory.synchronize()
        try recover(directory)
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

    /// Finishes what a crash interrupted. Called under the pool's lock.
    func recover(_ directory: borrowing Directory) throws(BackendError) {
        var changed = false
        for file in try directory.names() where file.hasPrefix(Self.ours) {
            let file = file.dropFirst()
            if let data = file.removing(suffix: Self.dataIn + Self.fresh) {
                let volume = String(data)
                if try directory.exists(Self.description(volume)), try !directory.exists(Self.data(volume)) {
                    try directory.rename(Self.ours + file, to: Self.data(volume))
                } else {
                    try directory.remove(Self.ours + file)
                }
                changed = true
            } else if file.hasSuffix(Self.describedBy + Self.fresh) {
                try directory.remove(Self.ours + file)
                changed = true
            } else if let gone = file.removing(suffix: Self.describedBy + Self.deleted) {
                let volume = String(gone)
                if try !directory.exists(Self.description(volume)) { try directory.remove(Self.data(volume)) }
                try directory.synchronize()
                try directory.remove(Self.ours + file)
                changed = true
            } else if file.hasPrefix(Layer.prefix) {
                try directory.remove(Self.ours + file)
                changed = true
            }
        }
        if changed { try directory.synchronize() }
        if try directory.exists(Self.marker) { try removeUnreferenced(directory) }
    }

    // MARK: List and open

    package func list() throws(BackendError) -> [VolumeRecord] {
        let directory = try openDirectory()
        if try directory.names().contains(where: { $0.hasPrefix(Self.ours) && $0 != Directory.lockFile }) {
            let lock = try directory.lock()
            defer { Glibc.close(lock) }
            try recover(directory)
        }
        return try records(directory)
    }

    private func records(_ directory: borrowing Directory) throws(BackendError) -> [VolumeRecord] {
        var records: [VolumeRecord] = []
        for file in try directory.names() where !file.hasPrefix(Self.ours) {
            guard let volume = file.removing(suffix: Self.describedBy) else { continue }
            do {
                records.append(try describe(directory, String(volume)).record)
            } catch {
                // Deleted since the directory was read.
                guard error.code == ENOENT else { throw error }
            }
        }
        return records.sorted { $0.volume < $1.volume }
    }

    func describe(_ directory: borrowing Directory, _ volume: String) throws(BackendError) -> VolumeDescription {
        let file = Self.description(volume)
        guard try directory.exists(file) else { throw missing(volume) }
        return try VolumeDescription.decode(try directory.read(file), volume: volume, file: "\(path)/\(file)")
    }

    package func open(volume: String, readOnly: Bool) throws(BackendError) -> any OpenVolume {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        return try open(directory, volume, readOnly: readOnly)
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
        var status = stat()
        guard fstat(data, &status) == 0, UInt64(status.st_size) >= record.size else {
            Glibc.close(data)
            throw BackendError(
                code: EIO,
                message: "\(path)/\(Self.data(volume)) has \(status.st_size) bytes, its description says "
                    + "\(record.size); data is missing, restore the file")
        }
        return LocalOpenVolume(pool: self, record: record, descriptor: data, readOnly: readOnly)
    }

    /// Opens the data file and locks it: one user that writes, or any number that only read.
    func openData(
        _ directory: borrowing Directory, _ volume: String, readOnly: Bool
    ) throws(BackendError) -> Int32 {
        let data = try directory.open(Self.data(volume), readOnly ? O_RDONLY : O_RDWR)
        guard flock(data, (readOnly ? LOCK_SH : LOCK_EX) | LOCK_NB) == 0 else {
            let code = errno
            Glibc.close(data)
            guard code == EWOULDBLOCK else {
                throw BackendError(code: code, message: "lock \(path)/\(Self.data(volume)): \(errnoText(code))")
            }
            throw BackendError(
                code: EBUSY,
                message: "\(name)/\(volume) is in use (\(path)/\(Self.data(volume)) is locked); unmap it first")
        }
        return data
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
