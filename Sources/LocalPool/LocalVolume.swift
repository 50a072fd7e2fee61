import Backend
import CLinux
import EventLoop
import Glibc
import Synchronization

/// A data file that is open and locked.
final class LocalOpenVolume: OpenVolume {
    private let pool: LocalPool
    private let current: Mutex<VolumeRecord>
    let readOnly: Bool
    let descriptor: Int32
    /// An fdatasync has failed: no later one may succeed for clients.
    let hasFailed = Atomic<Bool>(false)
    var record: VolumeRecord { current.withLock { $0 } }
    var protocolName: String { "local" }
    /// For error texts.
    var path: String { "\(pool.path)/\(LocalPool.data(record.volume))" }

    init(pool: LocalPool, record: VolumeRecord, descriptor: Int32, readOnly: Bool) {
        self.pool = pool
        current = Mutex(record)
        self.descriptor = descriptor
        self.readOnly = readOnly
    }

    func start(
        on loop: EventLoop, buffers: BufferPool, client: any BackendClient
    ) throws(BackendError) -> any Backend {
        do {
            return try LocalVolume(self, loop: loop, buffers: buffers, client: client)
        } catch { throw BackendError(error) }
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord {
        let grown = try pool.grow(volume: record.volume, data: descriptor, readOnly: readOnly, to: size)
        current.withLock { $0 = grown }
        return grown
    }

    func settle() throws(BackendError) {
        if !readOnly { try LayerFile(descriptor: descriptor, path: path).settle() }
    }

    /// Makes everything durable, or never claims again that something is.
    /// - Parameter file: the data, open as here, with a descriptor of its own or not.
    func synchronize(_ file: LayerFile) throws(BackendError) {
        do throws(BackendError) {
            guard !hasFailed.load(ordering: .relaxed) else {
                throw BackendError(
                    code: EIO,
                    message: "\(record.volume) could not be synchronised before; what was not flushed is uncertain")
            }
            try file.synchronize()
        } catch {
            hasFailed.store(true, ordering: .relaxed)
            throw error
        }
    }

    func failFlushes() { hasFailed.store(true, ordering: .relaxed) }

    func prepare(
        _ change: StoreChange, giveUp: () -> BackendError?
    ) throws(BackendError) -> any PreparedChange {
        try pool.prepare(change, of: .plain(self), giveUp: giveUp)
    }

    func close() { Glibc.close(descriptor) }
}

/// A volume in a file, on a loop. Reads and writes go through the page cache; a flush is fdatasync(2), FUA a write and then
/// an fdatasync of its range.
final class LocalVolume: Backend, FileCompletion {
    /// Extents of one answer: more do not fit 4 KiB.
    private static let maximumExtents = BufferPool.blockSize / MemoryLayout<Extent>.stride

    private(set) var geometry: Geometry
    private let volume: LocalOpenVolume
    private let buffers: BufferPool
    private unowned(unsafe) let client: any BackendClient
    private var ring: FileRing?
    private var fallback: ZeroWriter?
    /// Set by a failed fdatasync: the kernel reports lost writes once, and a later success would say nothing about
    /// them. Every flush fails from then on.
    private var flushError: Int32 = 0
    /// Answered when the fdatasync that is under way is done, and what waits for the next one.
    private var flushing = IOQueue()
    private var unflushed = FlushQueue()
    private let synchronized = UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 8)
    private var readsInPlace: ReadsInPlace?
    /// What the file system cannot do is asked for once.
    private var canPunch = true
    private var canZero = true

    init(_ volume: LocalOpenVolume, loop: EventLoop, buffers: BufferPool, client: any BackendClient)
        throws(SystemError)
    {
        self.volume = volume
        self.buffers = buffers
        self.client = client
        readsInPlace = ReadsInPlace(of: volume.descriptor, size: volume.record.size, for: client)
        var geometry = Geometry(size: volume.record.size, blockSize: volume.record.blockSize)
        geometry.readOnly = volume.readOnly
        self.geometry = geometry
        if volume.hasFailed.load(ordering: .relaxed) { flushError = EIO }
        // One operation for each I/O, and the fdatasync that they share.
        ring = try FileRing(loop: loop, capacity: client.maximumInFlight + 1, completion: self)
    }

    deinit { synchronized.deallocate() }

    func close() {
        if flushError != 0 { volume.hasFailed.store(true, ordering: .relaxed) }
        ring?.close()
        ring = nil
        // Its mapping would keep the file locked.
        readsInPlace = nil
    }

    // MARK: Submission

    func submit(_ io: UnsafeMutablePointer<IO>) {
        guard let ring else { return finish(io, EIO) }
        let context = UnsafeMutableRawPointer(io)
        let accepted: Bool
        switch io.pointee.operation {
        case .read:
            if let readsInPlace, readsInPlace.take(io) { return finish(io, 0) }
            guard let buffer = take(io) else { return finish(io, ENOMEM) }
            io.pointee.segment.base = buffer
            io.pointee.segment.count = Int(io.pointee.length)
            accepted = ring.read(
                volume.descriptor, into: buffer, length: Int(io.pointee.length), offset: io.pointee.offset,
                context: context)
        case .write:
            if io.pointee.durable, flushError != 0 { return finish(io, flushError) }
            accepted = ring.write(
                volume.descriptor, from: io.pointee.segment.base, length: Int(io.pointee.length),
                offset: io.pointee.offset, context: context)
        case .flush: return synchronize(io)
        case .trim, .writeZeroes:
            guard let mode = allocationMode(io.pointee) else { return cannotAllocate(io) }
            accepted = ring.allocate(
                volume.descriptor, mode: mode, offset: io.pointee.offset, length: Int(io.pointee.length),
                context: context)
        case .cache:
            // Advice: the kernel starts reading ahead, or does not.
            posix_fadvise(volume.descriptor, off_t(io.pointee.offset), off_t(io.pointee.length), POSIX_FADV_WILLNEED)
            return finish(io, 0)
        case .extents:
            io.pointee.ownsBuffer = false
            guard let buffer = buffers.allocate(BufferPool.blockSize) else { return finish(io, ENOMEM) }
            io.pointee.buffer = buffer
            io.pointee.ownsBuffer = true
            io.pointee.segment.base = buffer.base
            accepted = ring.queryExtents(
                volume.descriptor, offset: io.pointee.offset, length: Int(io.pointee.length),
                extents: buffer.base.bindMemory(to: Extent.self, capacity: Self.maximumExtents),
                capacity: Self.maximumExtents, context: context)
        }
        if !accepted { finish(io, EAGAIN) }
    }

    func resized(to size: UInt64) {
        geometry.size = size
        readsInPlace?.resized(to: size)
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }

    @inline(__always)
    private func take(_ io: UnsafeMutablePointer<IO>) -> UnsafeMutableRawPointer? {
        guard let buffer = buffers.allocate(Int(io.pointee.length)) else { return nil }
        io.pointee.buffer = buffer
        io.pointee.ownsBuffer = true
        return buffer.base
    }

    /// A punched hole reads as zeros and frees space; ZERO_RANGE keeps the space reserved, as NO_HOLE asks.
    private func allocationMode(_ io: IO) -> Int32? {
        if io.operation == .trim || io.mayPunch, canPunch { return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE }
        return canZero ? FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE : nil
    }

    /// The file system has neither operation: trim is advice, fast zeroes are refused, others are written.
    private func cannotAllocate(_ io: UnsafeMutablePointer<IO>) {
        if io.pointee.operation == .trim { return finish(io, 0) }
        if io.pointee.fast { return finish(io, EOPNOTSUPP) }
        guard let ring else { return finish(io, EIO) }
        let length = min(Int(io.pointee.length), ZeroWriter.chunk)
        if fallback == nil { fallback = ZeroWriter(buffers: buffers) }
        guard let zeros = fallback?.zeros else { return finish(io, ENOMEM) }
        io.pointee.segment.count = length
        if !ring.write(
            volume.descriptor, from: zeros, length: length, offset: io.pointee.offset,
            context: UnsafeMutableRawPointer(io))
        {
            finish(io, EAGAIN)
        }
    }

    // MARK: Completion

    func fileOperationCompleted(_ context: UnsafeMutableRawPointer, result: Int32) {
        if context == synchronized { return synchronizeCompleted(result < 0 ? -result : 0) }
        let io = context.assumingMemoryBound(to: IO.self)
        guard result >= 0 else { return failed(io, -result) }
        switch io.pointee.operation {
        case .extents:
            io.pointee.segment.count = Int(result) * MemoryLayout<Extent>.stride
            // Nothing found means that the file ended early.
            return finish(io, result == 0 ? EIO : 0)
        case .writeZeroes:
            if io.pointee.segment.count > 0 {
                // One piece of zeros is written; the next one goes on behind it.
                io.pointee.offset += UInt64(io.pointee.segment.count)
                io.pointee.length -= UInt32(io.pointee.segment.count)
                io.pointee.segment.count = 0
                if io.pointee.length > 0 { return cannotAllocate(io) }
            }
            if io.pointee.durable { return synchronize(io) }
        case .write, .trim: if io.pointee.durable { return synchronize(io) }
        case .read, .flush, .cache: break
        }
        finish(io, 0)
    }

    private func failed(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        switch io.pointee.operation {
        case .trim, .writeZeroes:
            guard code == EOPNOTSUPP, io.pointee.segment.count == 0 else { break }
            if io.pointee.operation == .trim || io.pointee.mayPunch, canPunch {
                canPunch = false
            } else {
                canZero = false
            }
            if io.pointee.operation == .trim { return finish(io, 0) }
            return submit(io)
        default: break
        }
        finish(io, code)
    }

    private func finish(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        io.pointee.status = code
        client.completed(io)
    }

    // MARK: Flushing

    /// A flush, or the rest of what is to be durable.
    private func synchronize(_ io: UnsafeMutablePointer<IO>) {
        guard flushError == 0 else { return finish(io, flushError) }
        unflushed.append(io)
        if flushing.isEmpty { startSynchronizing() }
    }

    private func startSynchronizing() {
        guard let ring else { return }
        let range = unflushed.range
        flushing = unflushed.takeAll()
        if !ring.synchronize(volume.descriptor, range: range, context: synchronized) { flushed(EAGAIN) }
    }

    private func synchronizeCompleted(_ code: Int32) {
        // Whatever the reason was, it does not help to remove it.
        // A snapshot that was given up may have seen it fail meanwhile.
        if code != 0 || volume.hasFailed.load(ordering: .relaxed) {
            flushError = EIO
            client.flushesFail()
        }
        flushed(flushError)
    }

    private func flushed(_ code: Int32) {
        var done = flushing
        flushing = IOQueue()
        if flushError != 0 {
            var rest = unflushed.takeAll()
            while let io = rest.popFirst() { done.append(io) }
        } else if !unflushed.isEmpty {
            startSynchronizing()
        }
        while let io = done.popFirst() { finish(io, code) }
    }
}

/// I/O that waits until what was written is on stable storage. One synchronisation of a file is under way at a time, and
/// those that come meanwhile share the next: the kernel reports a lost write once to each open file, so that of two at a
/// time one would fail, and the other say that all is well.
struct FlushQueue {
    private var waiting = IOQueue()
    private var lower = UInt64.max
    private var upper = UInt64.min
    private var wantsAll = false

    var isEmpty: Bool { waiting.isEmpty }

    /// What has to be synchronised for all of them, bytes; nil for everything.
    var range: Range<UInt64>? { wantsAll || lower >= upper ? nil : lower..<upper }

    /// - Parameter all: whether more than the I/O's own range is to be durable; always true but for a write.
    mutating func append(_ io: UnsafeMutablePointer<IO>, all: Bool = false) {
        if all || io.pointee.operation != .write {
            wantsAll = true
        } else {
            lower = min(lower, io.pointee.offset)
            upper = max(upper, io.pointee.offset + UInt64(io.pointee.length))
        }
        io.pointee.operation = .flush
        waiting.append(io)
    }

    mutating func takeAll() -> IOQueue {
        defer { self = FlushQueue() }
        return waiting
    }
}

/// A piece of zeros to write from, where the file system cannot zero by itself.
private final class ZeroWriter {
    static let chunk = 1 << 20
    let zeros: UnsafeMutableRawPointer
    private let buffer: Buffer
    private let buffers: BufferPool

    init?(buffers: BufferPool) {
        guard let buffer = buffers.allocate(Self.chunk) else { return nil }
        self.buffer = buffer
        self.buffers = buffers
        zeros = buffer.base
        memset(zeros, 0, Self.chunk)
    }

    deinit { buffers.free(buffer) }
}
