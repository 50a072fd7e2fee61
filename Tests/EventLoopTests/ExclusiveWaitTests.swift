import EventLoop
import Glibc
import Synchronization
import Testing

/// Answers every byte with the same, and expects nothing but the next one.
private final class Echo: EventSource, @unchecked Sendable {
    let loop: EventLoop
    let descriptor: Int32
    private(set) var token: EventLoop.Token?
    /// Bytes that came while the loop waited for them alone.
    private(set) var exclusive = 0
    /// What is done on the loop with each byte before it is answered, and after.
    var received: (() -> Void)?
    var answered: (() -> Void)?

    init(_ loop: EventLoop, _ descriptor: Int32) {
        self.loop = loop
        self.descriptor = descriptor
    }

    func start() { token = try? loop.add(descriptor, events: 1, source: self) }

    func remove() {
        if let token { loop.remove(token, descriptor: descriptor) }
        token = nil
    }

    private var waitedFor: (count: Int, byte: UInt8)?

    func receiveBlocking() -> Int {
        var byte: UInt8 = 0
        let count = recv(descriptor, &byte, 1, 0)
        if count >= 0 { waitedFor = (count, byte) }
        return count
    }

    func ready(events: UInt32) {
        var byte = waitedFor?.byte ?? 0
        let count = waitedFor?.count ?? recv(descriptor, &byte, 1, Int32(MSG_DONTWAIT))
        waitedFor = nil
        if count == 0 { return remove() }
        guard count == 1 else { return }
        if loop.waitsExclusively { exclusive += 1 }
        received?()
        send(descriptor, &byte, 1, Int32(MSG_NOSIGNAL))
        if let token { loop.expectOnly(token, descriptor: descriptor) }
        answered?()
    }
}

/// A loop that echoes, and the other end.
private final class Pair: @unchecked Sendable {
    let loop: EventLoop
    let echo: Echo
    let client: Int32

    init() async throws {
        var ends: [Int32] = [0, 0]
        let kind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue)
        try #require(socketpair(AF_UNIX, kind, 0, &ends) == 0)
        try #require(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0)
        loop = try EventLoop(name: "test")
        echo = Echo(loop, ends[0])
        client = ends[1]
        _ = await loop.call { [echo] in echo.start() }
    }

    /// On a thread of its own.
    func exchange(_ count: Int) async {
        let client = client
        await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
            let thread = try? Thread(name: "client") {
                var byte: UInt8 = 7
                for _ in 0..<count {
                    guard send(client, &byte, 1, Int32(MSG_NOSIGNAL)) == 1 else { break }
                    guard recv(client, &byte, 1, 0) == 1 else { break }
                }
                done.resume()
            }
            thread?.detach()
        }
    }

    var exclusive: Int { get async { await loop.call { [echo] in echo.exclusive } ?? -1 } }

    func close() async {
        _ = await loop.call { [echo] in echo.remove() }
        loop.stop()
        Glibc.close(echo.descriptor)
        Glibc.close(client)
    }
}

@Suite(.timeLimit(.minutes(2))) struct ExclusiveWaitTests {
    @Test func whoHasEveryEventIsWaitedForAlone() async throws {
        let pair = try await Pair()
        await pair.exchange(60)
        #expect(await pair.exclusive == 0)
        await pair.exchange(1000)
        #expect(await pair.exclusive > 900)
        // That question has ended it.
        #expect(fcntl(pair.echo.descriptor, F_GETFL) & O_NONBLOCK != 0)
        await pair.close()
    }

    @Test func postedWorkIsDoneInTheMiddleOfIt() async throws {
        let pair = try await Pair()
        for round in 0..<100 {
            await pair.exchange(80)
            #expect(await pair.loop.call { round } == round)
        }
        // In most rounds.
        #expect(await pair.exclusive > 500)
        await pair.close()
    }

    @Test func postedWorkIsDoneWhileInputComes() async throws {
        let pair = try await Pair()
        async let exchanged: Void = pair.exchange(20_000)
        let done = Mutex(0)
        for round in 0..<500 {
            let delay = UInt32(round * 7919 % 200)
            if await pair.loop.call({ round }) == round { done.withLock { $0 += 1 } }
            try await Task.sleep(nanoseconds: UInt64(delay) * 1000)
        }
        await exchanged
        #expect(done.withLock { $0 } == 500)
        await pair.close()
    }

    @Test func timersFireInTheMiddleOfIt() async throws {
        let pair = try await Pair()
        for delay in [UInt64(1), 1_000_000, 20_000_000] {
            let fired = AsyncStream.makeStream(of: Void.self)
            _ = await pair.loop.call { [echo = pair.echo] in
                var bytes = 0
                var timer: LoopTimer?
                echo.received = {
                    bytes += 1
                    guard bytes == 80 else { return }
                    #expect(echo.loop.waitsExclusively)
                    timer = LoopTimer(loop: echo.loop) { fired.continuation.yield() }
                    timer?.arm(after: delay)
                }
            }
            await pair.exchange(80)
            for await _ in fired.stream { break }
            _ = await pair.loop.call { [echo = pair.echo] in echo.received = nil }
        }
        await pair.close()
    }

    @Test func anotherSourceIsServedInTheMiddleOfIt() async throws {
        let pair = try await Pair()
        var ends: [Int32] = [0, 0]
        try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        let other = Echo(pair.loop, ends[0])
        _ = await pair.loop.call { other.start() }
        for _ in 0..<100 {
            await pair.exchange(100)
            var byte: UInt8 = 1
            #expect(send(ends[1], &byte, 1, 0) == 1)
            #expect(recv(ends[1], &byte, 1, 0) == 1)
        }
        #expect(await pair.exclusive > 1000)
        _ = await pair.loop.call { other.remove() }
        await pair.close()
        for descriptor in ends { close(descriptor) }
    }

    @Test(arguments: [false, true])
    func theEndOfTheSocketIsSeen(byItself: Bool) async throws {
        let pair = try await Pair()
        await pair.exchange(200)
        if byItself {
            shutdown(pair.client, Int32(SHUT_RDWR))
        } else {
            shutdown(pair.client, Int32(SHUT_WR))
        }
        while await pair.loop.call({ [echo = pair.echo] in echo.token != nil }) == true { await Task.yield() }
        await pair.close()
    }

    @Test func aSourceMayGoInTheMiddleOfIt() async throws {
        let pair = try await Pair()
        _ = await pair.loop.call { [echo = pair.echo] in
            var bytes = 0
            echo.received = {
                bytes += 1
                if bytes == 200 {
                    #expect(echo.loop.waitsExclusively)
                    echo.remove()
                    #expect(!echo.loop.waitsExclusively)
                }
            }
        }
        await pair.exchange(200)
        #expect(await pair.exclusive > 100)
        await pair.close()
    }

    /// Around the turn from which on it would be waited for alone.
    @Test(arguments: 60...70)
    func aSourceMayGoWhenItIsExpected(after count: Int) async throws {
        let pair = try await Pair()
        _ = await pair.loop.call { [echo = pair.echo] in
            var bytes = 0
            echo.answered = {
                bytes += 1
                if bytes == count { echo.remove() }
            }
        }
        await pair.exchange(count)
        let isGone = await pair.loop.call { [echo = pair.echo] in echo.token == nil }
        #expect(isGone == true)
        await pair.close()
    }
}
