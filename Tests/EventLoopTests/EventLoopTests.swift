import EventLoop
import Glibc
import Synchronization
import Testing

@Suite struct EventLoopTests {
    @Test func postedWorkRunsInOrderOnOneThread() async throws {
        let loop = try EventLoop(name: "test")
        let seen = Mutex<[Int]>([])
        for number in 0..<1000 { loop.post { seen.withLock { $0.append(number) } } }
        let thread = await loop.call { UInt(pthread_self()) }
        let other = await loop.call { UInt(pthread_self()) }
        #expect(seen.withLock { $0 } == Array(0..<1000))
        #expect(thread == other)
        loop.stop()
    }

    @Test func aStoppedLoopTakesNoWork() async throws {
        let loop = try EventLoop(name: "test")
        loop.stop()
        #expect(loop.post {} == false)
        #expect(await loop.call { 1 } == nil)
    }

    @Test func timersFireByDeadlineAndCancelledOnesDoNot() async throws {
        let loop = try EventLoop(name: "test")
        let fired = Mutex<[Int]>([])
        let kept = Mutex<[Timers]>([])
        await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
            loop.post {
                var timers: [LoopTimer] = []
                for delay in [30, 10, 20, 40, 5] {
                    let timer = LoopTimer(loop: loop) {
                        fired.withLock { $0.append(delay) }
                        if delay == 40 { done.resume() }
                    }
                    timer.arm(after: UInt64(delay) * 1_000_000)
                    timers.append(timer)
                }
                timers[2].cancel()
                timers[4].arm(after: 35_000_000)
                kept.withLock { $0.append(Timers(timers)) }
            }
        }
        #expect(fired.withLock { $0 } == [10, 30, 5, 40])
        kept.withLock { $0 = [] }
        loop.stop()
    }

    private final class Timers: @unchecked Sendable {
        let timers: [LoopTimer]
        init(_ timers: [LoopTimer]) { self.timers = timers }
    }

    private final class Reader: EventSource, @unchecked Sendable {
        let descriptor: Int32
        let received: @Sendable (UInt8) -> Void
        init(_ descriptor: Int32, _ received: @escaping @Sendable (UInt8) -> Void) {
            self.descriptor = descriptor
            self.received = received
        }
        func ready(events: UInt32) {
            var byte: UInt8 = 0
            if read(descriptor, &byte, 1) == 1 { received(byte) }
        }
    }

    @Test func readyDescriptorsAreDeliveredUntilRemoved() async throws {
        let loop = try EventLoop(name: "test")
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        let (input, output) = (ends[0], ends[1])
        let (bytes, continuation) = AsyncStream.makeStream(of: UInt8.self)
        let token = try #require(
            await loop.call { try? loop.add(input, events: 1, source: Reader(input) { continuation.yield($0) }) } ?? nil
        )
        var iterator = bytes.makeAsyncIterator()
        for byte in [UInt8(7), 8] {
            var byte = byte
            #expect(write(output, &byte, 1) == 1)
            #expect(await iterator.next() == byte)
        }
        _ = await loop.call { loop.remove(token, descriptor: input) }
        var byte: UInt8 = 9
        #expect(write(output, &byte, 1) == 1)
        // A turn later it was not delivered.
        _ = await loop.call {}
        continuation.finish()
        #expect(await iterator.next() == nil)
        loop.stop()
        close(input)
        close(output)
    }
}
