import Backend
import CLinux
import EventLoop
import Glibc

/// What a volume, or a snapshot of it, has on top of another layer; the first layer of a chain has all there is.
///
/// Two files of a pool: `@DATA.raw` is sparse and has the layer's clusters, each at its own place, holes being zeros.
/// `@ID.map` has a header and, unless the layer is the first, a byte for each cluster behind it, a `Mark`. Which clusters
/// a layer has is never left to the holes of its data: copying a pool, or a file system that allocates around a write,
/// makes holes of zeros and zeros of holes.
///
/// Below a head, the layer a volume writes to, nothing changes but by a merge, which changes no byte that can be read.
struct Layer: Equatable {
    /// Bytes. Whoever writes less to a cluster the layer does not have yet copies the rest from below.
    static let cluster: UInt64 = 64 << 10
    /// Bytes in front of the clusters' bytes; a page, so that they never share one with the header.
    static let headerSize: UInt64 = 4096
    /// Layers on top of each other. A chain's map in memory has a byte for each cluster.
    static let maximumDepth = 200

    /// A byte of the map.
    enum Mark {
        /// The layers below say what is there.
        static let absent: UInt8 = 0
        /// The layer has the cluster, and its data was on stable storage before this was written.
        static let lasting: UInt8 = 1
        /// The head has the cluster, with data that may not be on stable storage. That holds in the boot that the header
        /// names alone: a power cut may have left the mark and taken the data.
        static let inThisBoot: UInt8 = 2
    }

    /// How a daemon left the map.
    enum State: Equatable {
        /// No mark counts for one boot alone.
        case closed
        /// The head is or was written to, in the boot with this identifier.
        case written(boot: String)
        /// Of version 1, which had no marks for one boot: after a crash the data file's holes tell.
        case writtenWithoutMarks
    }

    let id: UInt64
    /// The layer below; nil for the first of a chain.
    var parent: UInt64?
    /// Which data file; another than `id` after a merge.
    var data: UInt64
    /// Id of the volume whose head or snapshot it is or was; nil where that is not known.
    var owner: UInt64?
    var state = State.closed

    var dataFile: String { Self.dataFile(data) }
    var mapFile: String { Self.mapFile(id) }
    static func dataFile(_ id: UInt64) -> String { "\(prefix)\(digits(id)).raw" }
    static func mapFile(_ id: UInt64) -> String { "\(prefix)\(digits(id)).map" }

    /// The id in the name of a map file; nil for any other name.
    static func id(ofMap file: String) -> UInt64? {
        guard file.hasPrefix(prefix), file.hasSuffix(".map"),
            let id = UInt64(file.dropFirst(prefix.utf8.count).dropLast(4), radix: 16), file == mapFile(id)
        else { return nil }
        return id
    }

    /// No volume's name has it.
    static let prefix = "@"

    private static func digits(_ id: UInt64) -> String {
        let digits = String(id, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }

    /// Bytes of the largest volume: up to a whole cluster it is still the offset of a file.
    static let maximumSize = UInt64(Int64.max) / cluster * cluster

    /// - Parameter size: at most `maximumSize`.
    static func clusters(_ size: UInt64) -> Int { Int((size + cluster - 1) / cluster) }

    /// `size`, up to a whole cluster: data files have no part of one, so that none is read beyond their end.
    static func padded(_ size: UInt64) -> UInt64 { UInt64(clusters(size)) * cluster }

    // MARK: Header

    /// One sector: it is written as a whole or not at all.
    static let headerText = 512

    func encode() -> [UInt8] {
        let boot = if case .written(let boot) = state { boot } else { "-" }
        let text = """
            # qbd layer; which data it has
            version = 2
            parent = \(hexadecimal(parent ?? 0))
            data = \(hexadecimal(data))
            owner = \(hexadecimal(owner ?? 0))
            boot = \(boot)

            """
        return Array(text.utf8) + Array(repeating: UInt8(ascii: "\n"), count: Self.headerText - text.utf8.count)
    }

    static func decode(_ bytes: some Collection<UInt8>, id: UInt64, file: String) throws(BackendError) -> Layer {
        let lines = try KeyValueLines(bytes.prefix(headerText), file: file)
        let version = try lines.number("version")
        guard version == 1 || version == 2 else {
            throw BackendError(
                code: EOPNOTSUPP, message: "\(file): version \(version) of a layer; a newer qbd wrote it")
        }
        let parent = try lines.number("parent")
        var layer = Layer(id: id, parent: parent == 0 ? nil : parent, data: try lines.number("data"))
        guard version == 2 else {
            if try lines.number("complete") == 0 { layer.state = .writtenWithoutMarks }
            return layer
        }
        let owner = try lines.number("owner")
        layer.owner = owner == 0 ? nil : owner
        let boot = try lines.text("boot")
        if boot != "-" {
            guard boot.utf8.count <= Boot.maximumLength else { throw lines.damaged("boot is none") }
            layer.state = .written(boot: String(boot))
        }
        return layer
    }
}

/// Which boot of the kernel this is.
enum Boot {
    static let maximumLength = 64

    /// The kernel's random number of this boot, proc(5) /proc/sys/kernel/random/boot_id.
    static func identifier() throws(BackendError) -> String {
        let path = "/proc/sys/kernel/random/boot_id"
        do throws(SystemError) {
            let file = try retrying("open \(path)") { qbd_open(path, O_RDONLY | O_CLOEXEC, 0) }
            defer { Glibc.close(file) }
            var bytes = [UInt8](repeating: 0, count: maximumLength)
            var length = 0
            while length < bytes.count {
                let count = try retrying("read \(path)") {
                    bytes.withUnsafeMutableBytes { read(file, $0.baseAddress.map { $0 + length }, $0.count - length) }
                }
                if count == 0 { break }
                length += count
            }
            let text = String(decoding: bytes.prefix(length).prefix { $0 > 32 && $0 < 127 }, as: UTF8.self)
            // Cut short, it would be that of another boot.
            guard text.utf8.count == 36 else { throw SystemError(code: EIO, operation: "read \(path)") }
            return text
        } catch {
            throw BackendError(
                code: error.code, message: "\(error); without it what was written before a crash is not known")
        }
    }
}

/// An open file of a layer, with what is asked of it. All calls block; the descriptor is the owner's to close.
struct LayerFile {
    let descriptor: Int32
    /// For error texts.
    let path: String

    @discardableResult
    private func call(_ operation: String, _ body: () -> Int) throws(BackendError) -> Int {
        do throws(SystemError) { return try retrying("\(operation) \(path)", body) } catch { throw BackendError(error) }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BackendError) {
        var done = 0
        while done < bytes.count {
            done += try call("write to") {
                pwrite(descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done, off_t(offset) + done)
            }
        }
    }

    /// - Returns: how many bytes there were, all that were asked for unless the file ends.
    func read(_ bytes: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BackendError) -> Int {
        var done = 0
        while done < bytes.count {
            let count = try call("read from") {
                pread(descriptor, bytes.baseAddress.map { $0 + done }, bytes.count - done, off_t(offset) + done)
            }
            if count == 0 { break }
            done += count
        }
        return done
    }

    func synchronize() throws(BackendError) { try call("synchronize") { Int(fdatasync(descriptor)) } }

    /// As `synchronize`, and when it fails, the next `synchronize` fails as well: the kernel reports lost writes once to
    /// each open file, and this is one of its own.
    func settle() throws(BackendError) {
        let own = qbd_open("/proc/self/fd/\(descriptor)", O_RDONLY | O_CLOEXEC, 0)
        // Where there is no /proc, all is left to be synchronised then.
        guard own >= 0 else { return }
        defer { Glibc.close(own) }
        try call("synchronize") { Int(fdatasync(own)) }
    }

    /// A second descriptor of the same open file, for its caller to close.
    func duplicate() throws(BackendError) -> LayerFile {
        LayerFile(
            descriptor: Int32(try call("duplicate the descriptor of") { Int(qbd_duplicate(descriptor)) }), path: path)
    }

    func length() throws(BackendError) -> UInt64 {
        var status = stat()
        try call("look at") { Int(fstat(descriptor, &status)) }
        return UInt64(clamping: status.st_size)
    }

    /// Bytes of the file system that the file takes.
    func used() throws(BackendError) -> UInt64 {
        var status = stat()
        try call("look at") { Int(fstat(descriptor, &status)) }
        return UInt64(clamping: status.st_blocks) * 512
    }

    /// Makes the file at least so long; what is new is a hole.
    func extend(to length: UInt64) throws(BackendError) {
        guard try self.length() < length else { return }
        try call("lengthen") { Int(ftruncate(descriptor, off_t(length))) }
    }

    /// Makes the file so long, if it is longer.
    func cut(to length: UInt64) throws(BackendError) {
        guard try self.length() > length else { return }
        try call("shorten") { Int(ftruncate(descriptor, off_t(length))) }
    }

    /// Locks the file without waiting.
    /// - Returns: false when somebody else has it.
    func lock(_ operation: Int32) throws(BackendError) -> Bool {
        do throws(BackendError) {
            try call("lock") { Int(flock(descriptor, operation | LOCK_NB)) }
            return true
        } catch {
            guard error.code == EWOULDBLOCK else { throw error }
            return false
        }
    }

    func unlock() throws(BackendError) { try call("unlock") { Int(flock(descriptor, LOCK_UN)) } }

    // MARK: Holes and data

    /// The stretches of a range that are data, in order.
    func forEachData(in range: Range<UInt64>, _ body: (Range<UInt64>) throws(BackendError) -> Void) throws(BackendError)
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let start = lseek(descriptor, off_t(position), SEEK_DATA)
            if start < 0, errno == ENXIO { return }
            guard start >= 0 else {
                throw BackendError(code: errno, message: "look for data in \(path): \(errnoText(errno))")
            }
            guard UInt64(start) < range.upperBound else { return }
            let end = lseek(descriptor, start, SEEK_HOLE)
            guard end > start else { throw BackendError(code: EIO, message: "\(path) changed while it was looked at") }
            let stretch = max(UInt64(start), position)..<min(UInt64(end), range.upperBound)
            try body(stretch)
            position = stretch.upperBound
        }
    }

    /// Makes a range read as zeros and take no space. EOPNOTSUPP where the file system cannot.
    func punch(_ range: Range<UInt64>) throws(BackendError) {
        try call("clear a part of") {
            Int(
                fallocate(
                    descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(range.lowerBound),
                    off_t(range.upperBound - range.lowerBound)))
        }
    }

    /// Makes a range read as zeros, and take no space where the file system can.
    func clear(_ range: Range<UInt64>) throws(BackendError) {
        do throws(BackendError) { try punch(range) } catch {
            guard error.code == EOPNOTSUPP else { throw error }
            var position = range.lowerBound
            while position < range.upperBound {
                let count = min(range.upperBound - position, Layer.cluster)
                try write(UnsafeRawBufferPointer(start: Zeros.bytes, count: Int(count)), at: position)
                position += count
            }
        }
    }

    /// Gives a range the data that another file has there. A file system that can shares it instead.
    func copy(_ range: Range<UInt64>, from source: LayerFile) throws(BackendError) {
        var position = range.lowerBound
        while position < range.upperBound {
            var from = off_t(position)
            var to = off_t(position)
            let count = copy_file_range(
                source.descriptor, &from, descriptor, &to, Int(min(range.upperBound - position, 64 << 20)), 0)
            if count > 0 {
                position += UInt64(count)
            } else if count < 0, errno == EINTR {
                continue
            } else if count < 0, [EXDEV, EOPNOTSUPP, ENOSYS, EINVAL].contains(errno) {
                return try copyByHand(position..<range.upperBound, from: source)
            } else {
                let code = count == 0 ? EIO : errno
                throw BackendError(code: code, message: "copy from \(source.path) to \(path): \(errnoText(code))")
            }
        }
    }

    private func copyByHand(_ range: Range<UInt64>, from source: LayerFile) throws(BackendError) {
        var position = range.lowerBound
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { bytes.deallocate() }
        while position < range.upperBound {
            let piece = Int(min(range.upperBound - position, UInt64(bytes.count)))
            let count = try source.read(UnsafeMutableRawBufferPointer(rebasing: bytes[..<piece]), at: position)
            guard count > 0 else { throw BackendError(code: EIO, message: "\(source.path) ends at \(position)") }
            try write(UnsafeRawBufferPointer(rebasing: bytes[..<count]), at: position)
            position += UInt64(count)
        }
    }

    // MARK: Maps

    /// The runs of clusters with the same mark, those that are absent left out, among the first `clusters`.
    func forEachRun(
        _ clusters: Int, _ body: (_ run: Range<Int>, _ mark: UInt8) throws(BackendError) -> Void
    ) throws(BackendError) {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { bytes.deallocate() }
        let end = Layer.headerSize + UInt64(clusters)
        try forEachData(in: Layer.headerSize..<end) { (range) throws(BackendError) in
            var position = range.lowerBound
            while position < range.upperBound {
                let piece = Int(min(range.upperBound - position, UInt64(bytes.count)))
                let count = try read(UnsafeMutableRawBufferPointer(rebasing: bytes[..<piece]), at: position)
                guard count > 0 else { return }
                let first = Int(position - Layer.headerSize)
                var index = 0
                while index < count {
                    let (start, mark) = (index, bytes[index])
                    while index < count, bytes[index] == mark { index += 1 }
                    if mark == Layer.Mark.lasting || mark == Layer.Mark.inThisBoot {
                        try body(first + start..<first + index, mark)
                    } else if mark != Layer.Mark.absent {
                        throw BackendError(
                            code: EIO,
                            message:
                                "\(path) is damaged: byte \(position + UInt64(start)) is \(mark), which says nothing")
                    }
                }
                position += UInt64(count)
            }
        }
    }

    /// The runs of clusters that the layer has for good.
    func forEachLasting(
        _ clusters: Int, _ body: (_ run: Range<Int>) throws(BackendError) -> Void
    ) throws(BackendError) {
        try forEachRun(clusters) { (run, mark) throws(BackendError) in
            if mark == Layer.Mark.lasting { try body(run) }
        }
    }

    /// Writes the same mark for a run of clusters.
    func mark(_ run: Range<Int>, as mark: UInt8 = Layer.Mark.lasting) throws(BackendError) {
        var position = run.lowerBound
        while position < run.upperBound {
            let count = min(run.upperBound - position, Marks.count)
            try write(
                UnsafeRawBufferPointer(start: Marks.bytes(mark), count: count), at: Layer.headerSize + UInt64(position))
            position += count
        }
    }

    func writeHeader(_ layer: Layer) throws(BackendError) {
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: Layer.headerText, alignment: 1)
        defer { bytes.deallocate() }
        bytes.copyBytes(from: layer.encode())
        try write(UnsafeRawBufferPointer(bytes), at: 0)
    }
}

/// Stretches of one byte, to mark clusters with.
enum Marks {
    static let count = 64 << 10

    static func bytes(_ mark: UInt8) -> UnsafeRawPointer {
        switch mark {
        case Layer.Mark.absent: UnsafeRawPointer(Zeros.bytes)
        case Layer.Mark.lasting: lasting
        default: inThisBoot
        }
    }

    nonisolated(unsafe) private static let lasting = stretch(Layer.Mark.lasting)
    nonisolated(unsafe) private static let inThisBoot = stretch(Layer.Mark.inThisBoot)

    private static func stretch(_ mark: UInt8) -> UnsafeRawPointer {
        let bytes = UnsafeMutableRawPointer.allocate(byteCount: count, alignment: 4096)
        memset(bytes, Int32(mark), count)
        return UnsafeRawPointer(bytes)
    }
}
