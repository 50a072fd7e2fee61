import EventLoop
import Testing

@Suite struct BufferPoolTests {
    @Test func buffersAreAlignedAndLargeEnough() throws {
        let pool = BufferPool(maximumRegions: 1)
        for bytes in [0, 1, 4096, 4097, 100_000, 1 << 20, (32 << 20) + 156] {
            let buffer = try #require(pool.allocate(bytes))
            #expect(buffer.capacity >= max(bytes, 4096))
            #expect(UInt(bitPattern: buffer.base) % 4096 == 0)
            pool.free(buffer)
        }
        #expect(pool.bytesInUse == 0)
    }

    @Test func buffersNeverOverlap() throws {
        let pool = BufferPool(maximumRegions: 4)
        var random = SystemRandomNumberGenerator()
        var held: [Buffer] = []
        for _ in 0..<20_000 {
            if held.count > 200 || (!held.isEmpty && Bool.random(using: &random)) {
                pool.free(held.remove(at: Int.random(in: 0..<held.count, using: &random)))
            } else {
                let bytes = 1 << Int.random(in: 8..<20, using: &random)
                held.append(try #require(pool.allocate(bytes)))
            }
        }
        let ranges = held.map { (UInt(bitPattern: $0.base), UInt(bitPattern: $0.base) + UInt($0.capacity)) }
            .sorted { $0.0 < $1.0 }
        for (first, second) in zip(ranges, ranges.dropFirst()) { #expect(first.1 <= second.0) }
        #expect(pool.bytesInUse == held.reduce(0) { $0 + $1.capacity })
        for buffer in held { pool.free(buffer) }
        #expect(pool.bytesInUse == 0)
    }

    @Test func everythingMergesBackIntoAWholeRegion() throws {
        let pool = BufferPool(maximumRegions: 1)
        let small = try (0..<1000).map { _ in try #require(pool.allocate(4096)) }
        #expect(pool.allocate(BufferPool.largest) == nil)
        for buffer in small.shuffled() { pool.free(buffer) }
        let whole = try #require(pool.allocate(BufferPool.largest))
        #expect(whole.capacity == BufferPool.largest)
    }

    @Test func beyondTheBoundThereIsNone() throws {
        let pool = BufferPool(maximumRegions: 1)
        #expect(pool.allocate(BufferPool.largest + 1) == nil)
        let whole = try #require(pool.allocate(BufferPool.largest))
        #expect(pool.allocate(1) == nil)
        pool.free(whole)
        #expect(pool.allocate(1) != nil)
    }

    @Test func trimmedBuffersReadAsZeros() throws {
        let pool = BufferPool(maximumRegions: 1)
        let buffer = try #require(pool.allocate(8192))
        buffer.base.storeBytes(of: 77, as: UInt8.self)
        pool.free(buffer)
        pool.trim()
        let again = try #require(pool.allocate(8192))
        #expect(again.base.load(as: UInt8.self) == 0)
    }
}
