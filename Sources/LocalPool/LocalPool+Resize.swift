import Backend
import CLinux
import EventLoop
import Glibc

// A volume grows in its data file first, and then in its description: what a crash leaves in between is a data file
// that is longer than the volume, and a volume of its old size.
extension LocalPool {
    package func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let directory = try Directory(path: path)
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        guard directory.exists(Self.description(volume)) else { throw missing(volume) }
        let data = try openData(directory, volume, readOnly: false)
        defer { Glibc.close(data) }
        return try grow(directory, volume, data, to: size)
    }

    /// Grows a volume that is open.
    /// - Parameter data: its data file, locked.
    func grow(volume: String, data: Int32, readOnly: Bool, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let directory = try Directory(path: path)
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        guard readOnly else { return try grow(directory, volume, data, to: size) }
        guard size == nil else {
            throw BackendError(
                code: EROFS, message: "\(name)/\(volume) is mapped read-only; map it writable to grow it")
        }
        return try describe(directory, volume)
    }

    private func grow(
        _ directory: borrowing Directory, _ volume: String, _ data: Int32, to wanted: UInt64?
    ) throws(BackendError) -> VolumeRecord {
        let record = try describe(directory, volume)
        var status = stat()
        fstat(data, &status)
        let length = UInt64(clamping: status.st_size)
        let size = wanted ?? max(record.size, length - length % UInt64(record.blockSize))
        if wanted == nil, size == record.size { return record }
        try record.checkGrowth(to: size, pool: name)
        let grown = record.resized(to: size)
        let file = "\(path)/\(Self.data(volume))"
        do throws(SystemError) {
            if wanted != nil {
                // What lies behind the end is not the volume's: it grows by zeros.
                if length > record.size { try retrying("cut \(file)") { ftruncate(data, off_t(record.size)) } }
                try retrying("make \(file) \(size) bytes long") { ftruncate(data, off_t(size)) }
            }
            try retrying("synchronize \(file)") { fsync(data) }
        } catch { throw BackendError(error) }
        try replaceDescription(directory, grown)
        return grown
    }

    /// Writes a volume's description anew, durably and at once.
    func replaceDescription(_ directory: borrowing Directory, _ record: VolumeRecord) throws(BackendError) {
        let file = Self.description(record.volume)
        let draft = Self.ours + file + Self.fresh
        do {
            try directory.write(VolumeDescription.encode(record), to: draft)
            try directory.rename(draft, to: file)
        } catch {
            try directory.remove(draft)
            throw error
        }
        try directory.synchronize()
    }
}
