import EventLoop
import Glibc
import Synchronization
import Testing

/// Blocks the thread of a loop at the end of a turn, as a write to a slow disk would.
private final class Blocker: TurnObserver, @unchecked Sendable {
    let loop: EventLoop
    let entered = Semaphore()
    let release = Semaphore()
    let left = Semaphore()
    let kept = Mutex<[Bool]>([])
    /// The loop's.
    private var isWanted = false
    private var turns = 0

    /// Nanoseconds of computing instead of waiting.
    private let spinning: UInt64

    init(spinning: UInt64 = 0) throws {
        self.spinning = spinning
        loop = try EventLoop(name: "test")
    }

    func start() async -> Bool {
        await loop.call { [self] in
            loop.observe(self)
            return (try? loop.prepareToBlock()) != nil
        } ?? false
    }

    func block() {
        loop.post { [self] in
            isWanted = true
            loop.runAgain()
        }
    }

    func endOfTurn() {
        turns += 1
        guard isWanted else { return }
        isWanted = false
        let before = turns
        let call = loop.enterBlocking()
        entered.signal()
        if spinning > 0 { spin() } else { release.wait() }
        let stayed = loop.leaveBlocking(call)
        // Nothing else ran meanwhile.
        if stayed { #expect(turns == before) }
        kept.withLock { $0.append(stayed) }
        left.signal()
    }

    private func spin() {
        let end = monotonicNanoseconds() + spinning
        while monotonicNanoseconds() < end {}
    }

    func waitUntilItMayBlock() async {
        while await loop.call({ [self] in loop.mayBlock }) == false { usleep(1000) }
    }

    func stop() async {
        _ = await loop.call { [self] in loop.unobserve(self) }
        loop.stop()
    }
}

@Suite(.timeLimit(.minutes(1))) struct ReliefTests {
    @Test func anotherThreadGoesOnWhileTheFirstIsAway() async throws {
        let blocker = try Blocker()
        let loop = blocker.loop
        #expect(await blocker.start())
        for _ in 0..<3 {
            await blocker.waitUntilItMayBlock()
            let first = await loop.call { UInt(pthread_self()) }
            blocker.block()
            blocker.entered.wait()
            // Only one who goes on can answer.
            let second = await loop.call { UInt(pthread_self()) }
            #expect(second != first)
            // Nobody stands by: it must not block as well.
            #expect(await loop.call { loop.mayBlock } == false)
            blocker.release.signal()
            blocker.left.wait()
            #expect(await loop.call { UInt(pthread_self()) } == second)
        }
        #expect(blocker.kept.withLock { $0 } == [false, false, false])
        await blocker.stop()
    }

    @Test func whoComesBackSoonStays() async throws {
        let blocker = try Blocker()
        #expect(await blocker.start())
        var stayed = 0
        for _ in 0..<200 {
            await blocker.waitUntilItMayBlock()
            blocker.release.signal()
            blocker.block()
            blocker.left.wait()
            stayed = blocker.kept.withLock { $0.count { $0 } }
        }
        // All of them, unless the machine itself stood still.
        #expect(stayed >= 150)
        await blocker.stop()
    }

    @Test func whoIsBusyStays() async throws {
        let blocker = try Blocker(spinning: 50_000_000)
        #expect(await blocker.start())
        var went = 0
        for _ in 0..<6 {
            await blocker.waitUntilItMayBlock()
            blocker.block()
            blocker.left.wait()
            // It was long, and did not wait: the next one may come at once. Unless it waited, after all, for a page.
            if await blocker.loop.call({ blocker.loop.mayBlock }) == true { went += 1 }
        }
        #expect(went >= 3)
        #expect(blocker.kept.withLock { $0 } == [Bool](repeating: true, count: 6))
        await blocker.stop()
    }

    @Test func aLoopStopsWhileAThreadIsAway() async throws {
        let blocker = try Blocker()
        #expect(await blocker.start())
        await blocker.waitUntilItMayBlock()
        blocker.block()
        blocker.entered.wait()
        _ = await blocker.loop.call { blocker.loop.unobserve(blocker) }
        let stopped = Mutex(false)
        let stopper = try Thread(name: "stop") {
            blocker.loop.stop()
            stopped.withLock { $0 = true }
        }
        while await blocker.loop.call({ 1 }) != nil { usleep(1000) }
        #expect(stopped.withLock { $0 } == false)
        blocker.release.signal()
        stopper.join()
        #expect(stopped.withLock { $0 })
    }
}
