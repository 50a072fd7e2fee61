import Testing
import Volumes

/// A clock that only moves when it is told to, and what passes a lane by it.
private struct Bench {
    var lane = ThrottleLane()
    /// Nanoseconds; not 0, as the clock of a machine that has been up for a while.
    var now: UInt64 = 77_000_000_000_000

    init(bytes: UInt64 = 0, operations: UInt64 = 0, burst: UInt64 = 100) {
        lane.set(bytes: bytes, operations: operations, burst: burst, now: now)
    }

    mutating func set(bytes: UInt64 = 0, operations: UInt64 = 0, burst: UInt64 = 100) {
        lane.set(bytes: bytes, operations: operations, burst: burst, now: now)
    }

    /// Requests of a size, one after the other, each as soon as it may, for a time.
    /// - Parameters:
    ///   - gap: nanoseconds that each takes before the next one comes.
    ///   - late: nanoseconds by which a timer fires too late.
    /// - Returns: how many passed.
    mutating func run(_ bytes: UInt64, seconds: Double, gap: UInt64 = 0, late: UInt64 = 0) -> Int {
        let end = now + UInt64(seconds * 1e9)
        var count = 0
        while now < end {
            let wait = lane.pass(bytes: bytes, now: now)
            if wait == 0 {
                count += 1
                now += gap
            } else {
                now += wait + late
            }
        }
        return count
    }
}

@Suite("Throttle")
struct ThrottleTests {
    static let mebibyte: UInt64 = 1 << 20

    @Test(
        "bytes per second hold within 2 % over 10 s, whatever the size of the requests",
        arguments: [4096, 16384, 65536, 1 << 20] as [UInt64], [8 << 20, 50_000_000, 1 << 30] as [UInt64])
    func byteRate(size: UInt64, rate: UInt64) {
        for (gap, late) in [(UInt64(0), UInt64(0)), (0, 60_000), (1000, 60_000)] {
            var bench = Bench(bytes: rate)
            let passed = Double(bench.run(size, seconds: 10, gap: gap, late: late)) * Double(size)
            #expect(abs(passed / Double(rate * 10) - 1) < 0.02, "gap \(gap), timers late by \(late)")
        }
    }

    @Test("operations per second hold within 2 % over 10 s", arguments: [50, 1000, 100_000] as [UInt64])
    func operationRate(rate: UInt64) {
        for (gap, late) in [(UInt64(0), UInt64(0)), (0, 60_000), (1000, 60_000)] {
            var bench = Bench(operations: rate)
            let passed = bench.run(4096, seconds: 10, gap: gap, late: late)
            #expect(abs(Double(passed) / Double(rate * 10) - 1) < 0.02, "gap \(gap), timers late by \(late)")
        }
    }

    @Test("of two limits the tighter one counts")
    func both() {
        var bytesFirst = Bench(bytes: 4_096_000, operations: 100_000)
        #expect(abs(bytesFirst.run(4096, seconds: 10) - 10_000) < 200)
        var operationsFirst = Bench(bytes: 1 << 30, operations: 1000)
        #expect(abs(operationsFirst.run(4096, seconds: 10) - 10_000) < 200)
    }

    @Test("a request larger than the bucket passes when that is full, and the next one waits for all of its debt")
    func debt() {
        var bench = Bench(bytes: 4096)
        #expect(bench.lane.pass(bytes: Self.mebibyte, now: bench.now) == 0)
        let wait = bench.lane.pass(bytes: 4096, now: bench.now)
        #expect(wait == 256_000_000_000)
        bench.now += wait - 1_000_000
        #expect(bench.lane.pass(bytes: 4096, now: bench.now) > 0)
        bench.now += 1_000_001
        #expect(bench.lane.pass(bytes: 4096, now: bench.now) == 0)
    }

    @Test("what is saved up is the burst and not more", arguments: [1, 100, 2000] as [UInt64])
    func burst(milliseconds: UInt64) {
        var bench = Bench(operations: 10_000, burst: milliseconds)
        bench.now += 3_600_000_000_000
        var count: UInt64 = 0
        while bench.lane.pass(bytes: 0, now: bench.now) == 0 { count += 1 }
        #expect(count == 10 * milliseconds)
    }

    @Test("a raised limit holds at once for what waits")
    func raised() {
        var bench = Bench(bytes: 4096)
        #expect(bench.lane.pass(bytes: Self.mebibyte, now: bench.now) == 0)
        #expect(bench.lane.pass(bytes: 4096, now: bench.now) > 200_000_000_000)
        bench.set(bytes: 100 << 20)
        #expect(bench.lane.pass(bytes: 4096, now: bench.now) < 20_000_000)
    }

    @Test("a lowered limit makes nobody wait for what passed under the old one")
    func lowered() {
        var bench = Bench(bytes: 1 << 20, burst: 10)
        #expect(bench.lane.pass(bytes: Self.mebibyte, now: bench.now) == 0)
        bench.set(bytes: 1024, burst: 10)
        #expect(bench.lane.pass(bytes: 1, now: bench.now) < 1_100_000_000)
    }

    @Test("a removed limit lets everything pass")
    func removed() {
        var bench = Bench(bytes: 1, operations: 1)
        #expect(bench.lane.pass(bytes: Self.mebibyte, now: bench.now) == 0)
        #expect(bench.lane.pass(bytes: Self.mebibyte, now: bench.now) > 0)
        bench.set()
        for _ in 0..<1000 { #expect(bench.lane.pass(bytes: 32 << 20, now: bench.now) == 0) }
    }

    @Test("the largest and the smallest rates and sizes are waited for in finite time")
    func extremes() {
        for rate in [1, UInt64(1) << 62] {
            var bench = Bench(bytes: rate, operations: rate, burst: 1)
            for _ in 0..<3 {
                let wait = bench.lane.pass(bytes: UInt64(UInt32.max), now: bench.now)
                #expect(wait <= 3_600_000_000_000)
            }
        }
    }

    @Test("a clock that stands still gives nothing")
    func standstill() {
        var bench = Bench(operations: 10)
        var passed = 0
        for _ in 0..<1000 where bench.lane.pass(bytes: 0, now: bench.now) == 0 { passed += 1 }
        #expect(passed == 1)
    }
}
