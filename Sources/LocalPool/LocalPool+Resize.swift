import Backend
import CLinux
import EventLoop
import Glibc

// A volume grows in its data file first, and then in its description: what a crash leaves in between is a data file
// that is longer than the volume, and a volume of its old size.
extension LocalPool {
    package func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let directory = try openDirectory()
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        switch try open(directory, volume, readOnly: false) {
        case let layered as LayeredOpenVolume:
            defer { layered.close() }
            return try grow(directory, layered, to: size)
        case let plain as LocalOpenVolume:
            defer { plain.close() }
            return try grow(directory, volume, plain.descriptor, to: size)
        default: preconditionFailure("a local pool has two kinds of volumes")
        }
    }

    /// Grows a volume that is open.
    /// - Parameter data: its data file, locked.
    func grow(volume: String, data: Int32, readOnly: Bool, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let directory = try openDirectory()
        if readOnly { return try describeReadOnly(directory, volume, growing: size) }
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        return try grow(directory, volume, data, to: size)
    }

    func grow(_ opened: LayeredOpenVolume, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let directory = try openDirectory()
        if opened.record.volume.contains("@") {
            guard size == nil else {
                throw BackendError(
                    code: EROFS, message: "\(name)/\(opened.record.volume) is a snapshot and never grows")
            }
            return opened.record
        }
        if opened.readOnly { return try describeReadOnly(directory, opened.record.volume, growing: size) }
        let lock = try directory.lock()
        defer { Glibc.close(lock) }
        try recover(directory)
        return try grow(directory, opened, to: size)
    }

    private func describeReadOnly(
        _ directory: borrowing Directory, _ volume: String, growing size: UInt64?
    ) throws(BackendError) -> VolumeRecord {
        guard size == nil else {
            throw BackendError(
                code: EROFS, message: "\(name)/\(volume) is mapped read-only; map it writable to grow it")
        }
        return try describe(directory, volume).record
    }

    /// A volume in layers has the size its description says; its files may be longer, and have holes there.
    private func grow(
        _ directory: borrowing Directory, _ opened: LayeredOpenVolume, to wanted: UInt64?
    ) throws(BackendError) -> VolumeRecord {
        var description = try describe(directory, opened.record.volume)
        guard let size = wanted else { return description.record }
        try description.record.checkGrowth(to: size, pool: name)
        try checkSize(size, opened.record.volume)
        // Who opens it next needs room for a map of so many clusters.
        _ = try ChainMap(clusters: Layer.clusters(size), head: 0)
        description.record = description.record.resized(to: size)
        try opened.headFile.extend(to: Layer.padded(size))
        try synchronize(directory, opened.head.dataFile)
        if let mapFile = opened.mapFile {
            try mapFile.extend(to: Layer.headerSize + UInt64(Layer.clusters(size)))
            try synchronize(directory, opened.head.mapFile)
        }
        // By the description: another daemon may have merged layers below the head since.
        if let first = try chain(directory, to: opened.head.id).first {
            let descriptor = try directory.open(first.dataFile, O_RDONLY)
            defer { Glibc.close(descriptor) }
            let file = LayerFile(descriptor: descriptor, path: "\(path)/\(first.dataFile)")
            try extendFirst(directory, first, file, to: size)
        }
        try replaceDescription(directory, description)
        return description.record
    }

    private func grow(
        _ directory: borrowing Directory, _ volume: String, _ data: Int32, to wanted: UInt64?
    ) throws(BackendError) -> VolumeRecord {
        var description = try describe(directory, volume)
        let record = description.record
        let file = LayerFile(descriptor: data, path: "\(path)/\(Self.data(volume))")
        let length = try file.length()
        let size = wanted ?? max(record.size, length - length % UInt64(record.blockSize))
        if wanted == nil, size == record.size { return record }
        try record.checkGrowth(to: size, pool: name)
        try checkSize(size, volume)
        description.record = record.resized(to: size)
        do throws(BackendError) {
            if wanted != nil {
                // What lies behind the end is not the volume's: it grows by zeros.
                try file.cut(to: record.size)
                do throws(BackendError) { try file.extend(to: size) } catch { throw failed(volume, error) }
            }
            try synchronize(directory, Self.data(volume))
            try putInPlace(directory, try draft(directory, description), of: description)
        } catch {
            if wanted != nil {
                // Otherwise the volume would grow when somebody asks it to take over the size of its file.
                do throws(BackendError) { try file.cut(to: record.size) } catch let left {
                    report("\(name)/\(volume) has not grown, and its file stays longer than it: \(left.message)")
                }
            }
            throw error
        }
        try directory.synchronize()
        return description.record
    }

    /// Makes a file durable that may be flushed for clients meanwhile: as an open file of its own, which takes no failure
    /// from them.
    private func synchronize(_ directory: borrowing Directory, _ file: String) throws(BackendError) {
        let own = try directory.open(file, O_RDONLY)
        defer { Glibc.close(own) }
        try LayerFile(descriptor: own, path: "\(path)/\(file)").synchronize()
    }
}
