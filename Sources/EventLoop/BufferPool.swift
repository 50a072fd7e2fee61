import CLinux
import Glibc

/// A piece of a pool's region, 4 KiB aligned. Plain value: whoever holds it last gives it back.
package struct Buffer {
    package let base: UnsafeMutableRawPointer
    fileprivate let region: UInt32
    fileprivate let order: UInt32

    /// Bytes, a power of two times 4 KiB.
    package var capacity: Int { BufferPool.blockSize << Int(order) }
}

/// Bytes at an address, in a chain: what a reply is written from.
package struct Segment {
    package var base: UnsafeMutableRawPointer
    package var count: Int
    package var next: UnsafeMutablePointer<Segment>?
    /// The bytes are not at `base`, but in the pipe that is read here; -1 when they are at `base`.
    package var pipe: Int32 = -1

    package init(base: UnsafeMutableRawPointer, count: Int) {
        self.base = base
        self.count = count
    }
}

/// Buffers for one loop, carved by the buddy system from regions of 64 MiB, so that a backend can register few large
/// areas with its hardware. Recently freed small buffers are handed out again first, without being merged.
/// A region is address space: memory is spent on what was used, and `trim` gives that back.
package final class BufferPool {
    package static let blockSize = 4096
    package static let regionSize = 64 << 20
    /// The largest buffer: a whole region.
    package static let largest = regionSize

    static let topOrder = 14
    private static let cachedOrders = 7
    private static let cachedPerOrder = 64

    private var regions: [Region] = []
    private let maximumRegions: Int
    private let cache: UnsafeMutablePointer<Buffer>
    private var cachedCount = (0, 0, 0, 0, 0, 0, 0)
    /// Bytes handed out.
    package private(set) var bytesInUse = 0

    /// - Parameter maximumRegions: the bound of address space, 64 MiB each.
    package init(maximumRegions: Int) {
        self.maximumRegions = maximumRegions
        cache = .allocate(capacity: Self.cachedOrders * Self.cachedPerOrder)
    }

    deinit {
        for region in regions { region.unmap() }
        cache.deallocate()
    }

    /// A buffer of at least `bytes` bytes, its contents undefined; nil when the system gives no more address space or
    /// `bytes` is beyond `largest`.
    package func allocate(_ bytes: Int) -> Buffer? {
        let blocks = (bytes &+ Self.blockSize &- 1) / Self.blockSize
        let order = blocks <= 1 ? 0 : Int.bitWidth - (blocks - 1).leadingZeroBitCount
        guard order <= Self.topOrder else { return nil }
        if order < Self.cachedOrders, let buffer = takeCached(order) {
            bytesInUse &+= Self.blockSize << order
            return buffer
        }
        guard let buffer = carve(order) else { return nil }
        bytesInUse &+= Self.blockSize << order
        return buffer
    }

    package func free(_ buffer: Buffer) {
        bytesInUse &-= buffer.capacity
        if buffer.order < Self.cachedOrders, putCached(buffer) { return }
        regions[Int(buffer.region)].merge(buffer)
    }

    /// Gives the memory of free buffers back to the system; their addresses stay.
    package func trim() {
        flushCache()
        for region in regions { region.releaseFreeMemory() }
    }

    private func carve(_ order: Int) -> Buffer? {
        for attempt in 0..<2 {
            for index in regions.indices {
                if let base = regions[index].carve(order) {
                    return Buffer(base: base, region: UInt32(index), order: UInt32(order))
                }
            }
            if attempt == 0 { flushCache() }
        }
        guard regions.count < maximumRegions, let region = Region() else { return nil }
        regions.append(region)
        guard let base = region.carve(order) else { return nil }
        return Buffer(base: base, region: UInt32(regions.count - 1), order: UInt32(order))
    }

    // MARK: The cache of small buffers

    @inline(__always)
    private func withCount<Result>(_ order: Int, _ body: (inout Int) -> Result) -> Result {
        withUnsafeMutableBytes(of: &cachedCount) { bytes in
            body(&bytes.assumingMemoryBound(to: Int.self)[order])
        }
    }

    @inline(__always)
    private func takeCached(_ order: Int) -> Buffer? {
        withCount(order) { count in
            guard count > 0 else { return nil }
            count &-= 1
            return cache[order &* Self.cachedPerOrder &+ count]
        }
    }

    @inline(__always)
    private func putCached(_ buffer: Buffer) -> Bool {
        withCount(Int(buffer.order)) { count in
            guard count < Self.cachedPerOrder else { return false }
            cache[Int(buffer.order) &* Self.cachedPerOrder &+ count] = buffer
            count &+= 1
            return true
        }
    }

    private func flushCache() {
        for order in 0..<Self.cachedOrders {
            while let buffer = takeCached(order) { regions[Int(buffer.region)].merge(buffer) }
        }
    }
}

/// One mapped area under the buddy system: block indices in doubly linked free lists, one per order.
private final class Region {
    private let base: UnsafeMutableRawPointer
    private let links: UnsafeMutablePointer<Link>
    private var heads = [Int32](repeating: -1, count: BufferPool.topOrder + 1)

    private struct Link {
        var next: Int32
        var previous: Int32
        /// Order of the free block that starts here plus one; 0 where none does. calloc makes every block taken.
        var freeOrder: Int32
    }

    init?() {
        let address = mmap(
            nil, BufferPool.regionSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let address, address != qbd_map_failed() else { return nil }
        let blocks = BufferPool.regionSize / BufferPool.blockSize
        guard let table = calloc(blocks, MemoryLayout<Link>.stride) else {
            munmap(address, BufferPool.regionSize)
            return nil
        }
        base = address
        links = table.bindMemory(to: Link.self, capacity: blocks)
        push(0, order: BufferPool.topOrder)
    }

    func unmap() {
        munmap(base, BufferPool.regionSize)
        Glibc.free(links)
    }

    func carve(_ order: Int) -> UnsafeMutableRawPointer? {
        var from = order
        while from <= BufferPool.topOrder, heads[from] < 0 { from &+= 1 }
        guard from <= BufferPool.topOrder else { return nil }
        let block = Int(heads[from])
        remove(block, order: from)
        while from > order {
            from &-= 1
            push(block &+ (1 << from), order: from)
        }
        return base + block &* BufferPool.blockSize
    }

    func merge(_ buffer: Buffer) {
        var block = (buffer.base - base) / BufferPool.blockSize
        var order = Int(buffer.order)
        while order < BufferPool.topOrder {
            let buddy = block ^ (1 << order)
            guard links[buddy].freeOrder == Int32(order) &+ 1 else { break }
            remove(buddy, order: order)
            block &= ~(1 << order)
            order &+= 1
        }
        push(block, order: order)
    }

    func releaseFreeMemory() {
        for order in 0...BufferPool.topOrder {
            var block = heads[order]
            while block >= 0 {
                release(base + Int(block) * BufferPool.blockSize, BufferPool.blockSize << order)
                block = links[Int(block)].next
            }
        }
    }

    /// Memory the daemon has locked needs a flag that came with Linux 5.18; on older kernels it stays.
    private func release(_ address: UnsafeMutableRawPointer, _ length: Int) {
        if madvise(address, length, MADV_DONTNEED) != 0 { madvise(address, length, MADV_DONTNEED_LOCKED) }
    }

    private func push(_ block: Int, order: Int) {
        let head = heads[order]
        links[block] = Link(next: head, previous: -1, freeOrder: Int32(order) &+ 1)
        if head >= 0 { links[Int(head)].previous = Int32(block) }
        heads[order] = Int32(block)
    }

    private func remove(_ block: Int, order: Int) {
        let link = links[block]
        if link.previous >= 0 { links[Int(link.previous)].next = link.next } else { heads[order] = link.next }
        if link.next >= 0 { links[Int(link.next)].previous = link.previous }
        links[block].freeOrder = 0
    }
}
