import Backend
import EventLoop
import FuzzSupport
import Glibc

/// Volumes in memory whose backend is as awkward as one may be: it wants small transfers and no crossing of boundaries,
/// completes late and out of order, and cannot read one place.
final class ShuffledPool: VolumePool {
    let name: String

    init(name: String) { self.name = name }

    func create(volume: String, size: UInt64, blockSize: UInt32) -> VolumeRecord {
        VolumeRecord(id: 1 << 24, volume: volume, size: size, blockSize: blockSize, created: 0)
    }

    func delete(volume: String, snapshots: Bool, force: Bool) {}

    func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord { throw fixedSize }

    func list() -> [VolumeRecord] { [] }

    func open(volume: String, readOnly: Bool) -> any OpenVolume {
        ShuffledVolume(record: create(volume: volume, size: Server.size, blockSize: 512), readOnly: readOnly)
    }
}

private final class ShuffledVolume: OpenVolume {
    let record: VolumeRecord
    let readOnly: Bool
    var protocolName: String { "shuffled" }

    init(record: VolumeRecord, readOnly: Bool) {
        self.record = record
        self.readOnly = readOnly
    }

    func start(on loop: EventLoop, buffers: BufferPool, client: any BackendClient) -> any Backend {
        ShuffledBackend(record, loop, buffers, client)
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord { throw fixedSize }

    func close() {}
}

private let fixedSize = BackendError(code: EOPNOTSUPP, message: "a volume of this kind does not grow")

final class ShuffledBackend: Backend, TurnObserver {
    /// Reads here fail with EIO.
    static let unreadable: Range<UInt64> = 700 << 10..<704 << 10

    let geometry: Geometry
    private let loop: EventLoop
    private let buffers: BufferPool
    private let client: any BackendClient
    private let base: UnsafeMutableRawPointer
    private var pending: [UnsafeMutablePointer<IO>] = []
    private var turns = 0

    init(_ record: VolumeRecord, _ loop: EventLoop, _ buffers: BufferPool, _ client: any BackendClient) {
        var geometry = Geometry(size: record.size, blockSize: record.blockSize)
        geometry.maximumTransfer = 24 << 10
        geometry.boundary = 64 << 10
        self.geometry = geometry
        self.loop = loop
        self.buffers = buffers
        self.client = client
        base = .allocate(byteCount: Int(record.size), alignment: 4096)
        loop.observe(self)
    }

    func close() { loop.unobserve(self) }

    func resized(to size: UInt64) {}

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? {
        offset & 0x4000 == 0 ? base + Int(offset) : nil
    }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        check(io)
        io.pointee.status = perform(io)
        pending.append(io)
        loop.runAgain()
    }

    /// What the volume owes its backend.
    private func check(_ io: UnsafeMutablePointer<IO>) {
        let offset = io.pointee.offset
        let length = UInt64(io.pointee.length)
        if io.pointee.operation == .flush { return }
        require(length > 0 && offset + length <= geometry.size)
        require((offset | length) & UInt64(geometry.blockSize - 1) == 0)
        require(offset / geometry.boundary == (offset + length - 1) / geometry.boundary)
        if io.pointee.operation == .read || io.pointee.operation == .write {
            require(length <= UInt64(geometry.maximumTransfer))
        }
    }

    private func perform(_ io: UnsafeMutablePointer<IO>) -> Int32 {
        // A flush has no place, whatever its client wrote there.
        if io.pointee.operation == .flush { return 0 }
        let offset = Int(io.pointee.offset)
        let length = Int(io.pointee.length)
        switch io.pointee.operation {
        case .read: return read(io, offset, length)
        case .write:
            require(io.pointee.segment.count == length)
            // It may be there already.
            memmove(base + offset, io.pointee.segment.base, length)
        case .trim, .writeZeroes: memset(base + offset, 0, length)
        case .extents:
            guard let buffer = takeBuffer(io, BufferPool.blockSize) else { return ENOMEM }
            let extent = Extent(length: io.pointee.length, flags: 0)
            buffer.base.storeBytes(of: extent, as: Extent.self)
            io.pointee.segment.count = MemoryLayout<Extent>.stride
        case .flush, .cache: break
        }
        return 0
    }

    private func read(_ io: UnsafeMutablePointer<IO>, _ offset: Int, _ length: Int) -> Int32 {
        if Self.unreadable.overlaps(UInt64(offset)..<UInt64(offset + length)) { return EIO }
        if offset & 0x2000 == 0 {
            // From where it lies.
            io.pointee.segment.base = base + offset
        } else {
            guard let buffer = takeBuffer(io, length) else { return ENOMEM }
            buffer.base.copyMemory(from: base + offset, byteCount: length)
        }
        io.pointee.segment.count = length
        return 0
    }

    private func takeBuffer(_ io: UnsafeMutablePointer<IO>, _ length: Int) -> Buffer? {
        guard let buffer = buffers.allocate(length) else { return nil }
        io.pointee.buffer = buffer
        io.pointee.ownsBuffer = true
        io.pointee.segment.base = buffer.base
        return buffer
    }

    /// Completes what is pending, back to front, and now and then keeps one for the next turn.
    func endOfTurn() {
        guard !pending.isEmpty else { return }
        turns &+= 1
        var now = pending
        pending = []
        if now.count > 1, turns % 3 == 0 {
            pending.append(now.removeFirst())
            loop.runAgain()
        }
        for io in now.reversed() { client.completed(io) }
    }
}
