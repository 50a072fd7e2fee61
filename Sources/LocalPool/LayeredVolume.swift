import Backend
import CLinux
import EventLoop
import Glibc

/// A chain of layers on a loop. Reads go to the layer that has the cluster. Writes go to the head at once where it has
/// the cluster; the first write to any other is a take-over: the cluster is read from below, unless all of it is written,
/// changed in memory, written to the head, and is the head's from then on. Further writes to it wait for that.
final class LayeredVolume: Backend, FileCompletion {
    static let maximumExtents = BufferPool.blockSize / MemoryLayout<Extent>.stride
    static let maximumTakeovers = 256
    /// Clusters are locked by what is left of their number.
    static let locks = 1024

    private(set) var geometry: Geometry
    let volume: LayeredOpenVolume
    let map: ChainMap
    let buffers: BufferPool
    unowned(unsafe) let client: any BackendClient
    var ring: FileRing?
    /// Of the layers' data, as `map.entries` counts them.
    private let descriptors: UnsafeMutablePointer<Int32>
    let head: Int32

    // Take-overs and zeroing.
    var takeovers = Slab<Takeover>(capacity: maximumTakeovers)
    let isLocked: UnsafeMutablePointer<Bool>
    /// A run of clusters is being zeroed, and nothing is taken over.
    var isExclusive = false
    var waiting = IOQueue()
    var isServingWaiting = false
    /// Of those that wait, how many have to be alone.
    var zeroingWaits = 0

    // Flushing.
    var flush = FlushState()
    let dataSynchronized = UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 8)
    let runMarked = UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 8)
    let mapSynchronized = UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 8)

    /// The most writes to the map file at a time.
    static let markedAtOnce = 64

    var canPunch = true
    var canZero = true
    /// All writes fail: what a crash would leave is not what was answered.
    var isStopped = false

    init(_ volume: LayeredOpenVolume, loop: EventLoop, buffers: BufferPool, client: any BackendClient)
        throws(SystemError)
    {
        self.volume = volume
        map = volume.map
        self.buffers = buffers
        self.client = client
        geometry = Geometry(size: volume.record.size, blockSize: volume.record.blockSize)
        geometry.readOnly = volume.readOnly
        geometry.transferBoundary = Layer.cluster
        descriptors = .allocate(capacity: volume.files.count)
        for (index, file) in volume.files.enumerated() { descriptors[index] = file.descriptor }
        head = volume.headFile.descriptor
        if volume.hasFailed.load(ordering: .relaxed) { flush.error = EIO }
        isLocked = .allocate(capacity: Self.locks)
        isLocked.initialize(repeating: false, count: Self.locks)
        // One operation for each I/O, and those of a round of flushing.
        ring = try FileRing(loop: loop, capacity: client.maximumInFlight + Self.markedAtOnce + 1, completion: self)
    }

    deinit {
        descriptors.deallocate()
        isLocked.deallocate()
        dataSynchronized.deallocate()
        runMarked.deallocate()
        mapSynchronized.deallocate()
    }

    func close() {
        ring?.close()
        ring = nil
        if flush.error != 0 { volume.hasFailed.store(true, ordering: .relaxed) }
    }

    /// `grow` of the open volume has made room in the map.
    func resized(to size: UInt64) {
        do throws(BackendError) {
            try map.grow(to: Layer.clusters(size))
            geometry.size = size
        } catch {
            // There is no memory for the map of what is new: I/O there fails with ENOMEM.
        }
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }

    @inline(__always)
    func cluster(_ io: UnsafeMutablePointer<IO>) -> Int {
        Int(truncatingIfNeeded: io.pointee.offset / Layer.cluster)
    }

    @inline(__always)
    func descriptor(of cluster: Int) -> Int32 { descriptors[Int(map.entries[cluster])] }

    func finish(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        io.pointee.status = code
        client.completed(io)
    }

    // MARK: Submission

    func submit(_ io: UnsafeMutablePointer<IO>) {
        guard let ring else { return finish(io, EIO) }
        let context = UnsafeMutableRawPointer(io)
        let accepted: Bool
        switch io.pointee.operation {
        case .read:
            let length = Int(io.pointee.length)
            guard cluster(io) < map.clusters else { return finish(io, ENOMEM) }
            guard let buffer = buffers.allocate(length) else { return finish(io, ENOMEM) }
            io.pointee.buffer = buffer
            io.pointee.ownsBuffer = true
            io.pointee.segment.base = buffer.base
            io.pointee.segment.count = length
            accepted = ring.read(
                descriptor(of: cluster(io)), into: buffer.base, length: length, offset: io.pointee.offset,
                context: context)
        case .write:
            guard cluster(io) < map.clusters else { return finish(io, ENOMEM) }
            if isStopped { return finish(io, EIO) }
            if io.pointee.durable, flush.error != 0 { return finish(io, flush.error) }
            return write(io)
        case .flush: return synchronize(io)
        case .trim, .writeZeroes:
            guard io.pointee.offset + UInt64(io.pointee.length) <= UInt64(map.clusters) * Layer.cluster else {
                return finish(io, ENOMEM)
            }
            if isStopped { return finish(io, EIO) }
            if io.pointee.durable, flush.error != 0 { return finish(io, flush.error) }
            return zero(io)
        case .cache:
            cache(io)
            return finish(io, 0)
        case .extents: return queryExtents(io, ring)
        }
        if !accepted { finish(io, EAGAIN) }
    }

    /// Advice for as many layers as take little time to tell.
    private func cache(_ io: UnsafeMutablePointer<IO>) {
        var offset = io.pointee.offset
        let end = min(offset + UInt64(io.pointee.length), UInt64(map.clusters) * Layer.cluster)
        for _ in 0..<16 where offset < end {
            let run = run(offset, end)
            posix_fadvise(descriptor(of: Int(offset / Layer.cluster)), off_t(offset), off_t(run), POSIX_FADV_WILLNEED)
            offset += UInt64(run)
        }
    }

    /// Bytes from an offset on, not beyond `end`, that one layer has.
    private func run(_ offset: UInt64, _ end: UInt64) -> Int {
        let first = Int(offset / Layer.cluster)
        let limit = Int((end - 1) / Layer.cluster) - first + 1
        let last = UInt64(first + map.run(from: first, limit: limit)) * Layer.cluster
        return Int(min(last, end) - offset)
    }

    /// An answer may be shorter than the question: this one ends where another layer begins.
    private func queryExtents(_ io: UnsafeMutablePointer<IO>, _ ring: FileRing) {
        io.pointee.ownsBuffer = false
        guard cluster(io) < map.clusters, let buffer = buffers.allocate(BufferPool.blockSize) else {
            return finish(io, ENOMEM)
        }
        io.pointee.buffer = buffer
        io.pointee.ownsBuffer = true
        io.pointee.segment.base = buffer.base
        let end = min(io.pointee.offset + UInt64(io.pointee.length), UInt64(map.clusters) * Layer.cluster)
        let accepted = ring.queryExtents(
            descriptor(of: cluster(io)), offset: io.pointee.offset, length: run(io.pointee.offset, end),
            extents: buffer.base.bindMemory(to: Extent.self, capacity: Self.maximumExtents),
            capacity: Self.maximumExtents, context: UnsafeMutableRawPointer(io))
        if !accepted { finish(io, EAGAIN) }
    }

    // MARK: Completion

    func fileOperationCompleted(_ context: UnsafeMutableRawPointer, result: Int32) {
        let code = result < 0 ? -result : 0
        if UInt(bitPattern: context) & 1 == 1 {
            return takeoverCompleted(
                (context - 1).assumingMemoryBound(to: Takeover.self), code)
        }
        if context == dataSynchronized || context == runMarked || context == mapSynchronized {
            return flushStepCompleted(context, code)
        }
        let io = context.assumingMemoryBound(to: IO.self)
        switch io.pointee.operation {
        case .read, .cache: finish(io, code)
        case .write: written(io, code)
        case .flush: preconditionFailure("a flush has no operation of its own")
        case .extents:
            io.pointee.segment.count = Int(max(result, 0)) * MemoryLayout<Extent>.stride
            // Nothing found means that the file ended early.
            finish(io, result == 0 ? EIO : code)
        case .trim, .writeZeroes: zeroed(io, code)
        }
    }
}

/// I/O in its order, linked through what it is made of: the chain of segments is of use to reads alone.
struct IOQueue {
    private(set) var first: UnsafeMutablePointer<IO>?
    private var last: UnsafeMutablePointer<IO>?

    var isEmpty: Bool { first == nil }

    mutating func append(_ io: UnsafeMutablePointer<IO>) {
        io.pointee.segment.next = nil
        let link = UnsafeMutableRawPointer(io).assumingMemoryBound(to: Segment.self)
        if let last { last.pointee.segment.next = link } else { first = io }
        last = io
    }

    mutating func popFirst() -> UnsafeMutablePointer<IO>? {
        guard let io = first else { return nil }
        first = io.pointee.segment.next.map { UnsafeMutableRawPointer($0).assumingMemoryBound(to: IO.self) }
        if first == nil { last = nil }
        io.pointee.segment.next = nil
        return io
    }
}
