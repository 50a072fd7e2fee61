import Backend
import CLinux
import EventLoop
import Glibc

/// A volume in memory, on a loop. Everything completes at once; reads are answered from where the data lies.
final class MemoryVolume: Backend {
    /// Bytes, from which on it pays to prefetch a read.
    private static let prefetched = 32 << 10

    private(set) var geometry: Geometry
    private let store: MemoryStore
    private let buffers: BufferPool
    private unowned(unsafe) let client: any BackendClient

    init(_ store: MemoryStore, readOnly: Bool, buffers: BufferPool, client: any BackendClient) {
        self.store = store
        self.buffers = buffers
        self.client = client
        var geometry = Geometry(size: store.record.size, blockSize: store.record.blockSize)
        geometry.readOnly = readOnly
        self.geometry = geometry
    }

    func close() {}

    func resized(to size: UInt64) { geometry.size = size }

    /// A write that is cut off by the end of its connection may be there in part, as on any disk.
    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? {
        mark(Int(truncatingIfNeeded: offset), Int(length))
        return store.base + Int(truncatingIfNeeded: offset)
    }

    /// What was zeroed since the last time is marked again: a piece without a mark counts as zeros.
    func payloadArrived(offset: UInt64, length: UInt32) { mark(Int(truncatingIfNeeded: offset), Int(length)) }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        let offset = Int(truncatingIfNeeded: io.pointee.offset)
        let length = Int(io.pointee.length)
        io.pointee.status = 0
        switch io.pointee.operation {
        case .read:
            // The kernel copies from memory that is not in a cache at half the speed.
            if length >= Self.prefetched { qbd_prefetch(store.base + offset, length) }
            io.pointee.segment.base = store.base + offset
            io.pointee.segment.count = length
        case .write:
            let place = store.base + offset
            if io.pointee.segment.base != place { place.copyMemory(from: io.pointee.segment.base, byteCount: length) }
            mark(offset, length)
        case .trim: zero(offset, length)
        case .writeZeroes where io.pointee.mayPunch: zero(offset, length)
        case .writeZeroes:
            memset(store.base + offset, 0, length)
            mark(offset, length)
        case .extents: extents(io, offset, length)
        case .flush, .cache: break
        }
        client.completed(io)
    }

    @inline(__always)
    private func mark(_ offset: Int, _ length: Int) {
        var piece = offset / MemoryStore.grain
        let last = (offset &+ length &- 1) / MemoryStore.grain
        while piece <= last {
            store.written[piece] = true
            piece &+= 1
        }
    }

    /// Whole pieces are given back to the system, what remains at the ends is cleared.
    private func zero(_ offset: Int, _ length: Int) {
        let grain = MemoryStore.grain
        let end = offset + length
        let firstWhole = (offset + grain - 1) / grain
        // The last piece of the volume may be short and is whole all the same.
        let lastWhole = end == Int(geometry.size) ? (end + grain - 1) / grain : end / grain
        guard firstWhole < lastWhole else {
            clear(offset, end)
            return
        }
        clear(offset, firstWhole * grain)
        let wholeEnd = min(lastWhole * grain, end)
        let whole = store.base + firstWhole * grain
        if madvise(whole, wholeEnd - firstWhole * grain, MADV_DONTNEED) != 0 {
            memset(whole, 0, wholeEnd - firstWhole * grain)
        }
        memset(store.written + firstWhole, 0, lastWhole - firstWhole)
        clear(wholeEnd, end)
    }

    /// Clears inside pieces; those that were never written are zeros already.
    private func clear(_ start: Int, _ end: Int) {
        var position = start
        while position < end {
            let next = min(end, (position / MemoryStore.grain + 1) * MemoryStore.grain)
            if store.written[position / MemoryStore.grain] { memset(store.base + position, 0, next - position) }
            position = next
        }
    }

    private func extents(_ io: UnsafeMutablePointer<IO>, _ offset: Int, _ length: Int) {
        guard let buffer = buffers.allocate(BufferPool.blockSize) else {
            io.pointee.status = ENOMEM
            return
        }
        io.pointee.buffer = buffer
        io.pointee.ownsBuffer = true
        let capacity = BufferPool.blockSize / MemoryLayout<Extent>.stride
        let extents = buffer.base.bindMemory(to: Extent.self, capacity: capacity)
        var count = 0
        var position = offset
        let end = offset + length
        while position < end, count < capacity {
            let kind = store.written[position / MemoryStore.grain]
            var next = position
            while next < end, store.written[next / MemoryStore.grain] == kind {
                next = min(end, (next / MemoryStore.grain + 1) * MemoryStore.grain)
            }
            extents[count] = Extent(length: UInt32(next - position), flags: kind ? 0 : Extent.holeAndZero)
            count += 1
            position = next
        }
        io.pointee.segment.base = buffer.base
        io.pointee.segment.count = count * MemoryLayout<Extent>.stride
    }
}
