import Backend
import Glibc
import Testing
import Volumes

@Suite("Bring-up")
struct BringUpTests {
    private static let second: UInt64 = 1_000_000_000

    private func error(_ code: Int32) -> BackendError { BackendError(code: code, message: "no luck") }

    /// How often it is tried until it is given up, and the errno then, by a clock that moves with the pauses.
    private func run(_ occasion: BringUp.Occasion, _ code: Int32) -> (tries: Int, seconds: UInt64, code: Int32) {
        let start = 500 * Self.second
        var now = start
        let bringUp = BringUp(occasion, now: now)
        for tries in 1..<10_000 {
            switch bringUp.decide(error(code), now: now) {
            case .again(let pause): now += pause
            case .giveUp(let error): return (tries, (now - start) / Self.second, error.code)
            }
        }
        return (10_000, 0, 0)
    }

    @Test("what is becoming ready is tried once a second until the limit")
    func becomingReady() {
        for code in [EAGAIN, ETIMEDOUT, ECONNREFUSED, ECONNRESET, EHOSTDOWN, EHOSTUNREACH, ENETUNREACH] {
            #expect(run(.map(limit: 180), code) == (181, 179, ETIMEDOUT))
        }
        #expect(run(.map(limit: 1), EAGAIN) == (2, 0, ETIMEDOUT))
    }

    @Test("what needs a person is told at once", arguments: [ENOENT, EACCES, EPERM, EROFS, EIO, EINVAL, ENOSPC, EBUSY])
    func needsAPerson(code: Int32) {
        #expect(run(.map(limit: 180), code) == (1, 0, code))
    }

    @Test("a daemon that ends may hold its lock for a while; all else is left to the next try of the takeover")
    func takeover() {
        let result = run(.takeover, EBUSY)
        #expect(result.code == EBUSY && result.seconds == 10 && result.tries > 100)
        #expect(run(.takeover, ENOENT) == (1, 0, ENOENT))
        #expect(run(.takeover, ECONNREFUSED) == (1, 0, ECONNREFUSED))
    }

    @Test("the text says what was waited for")
    func text() {
        let bringUp = BringUp(.map(limit: 5), now: 0)
        guard case .giveUp(let error) = bringUp.decide(error(EAGAIN), now: 5 * Self.second) else {
            Issue.record("tried again")
            return
        }
        #expect(error.message == "not ready within 5 s: no luck")
    }

    @Test("a size or a protection that cannot be served is an error that says so")
    func checks() throws {
        func record(_ size: UInt64, _ block: UInt32) -> VolumeRecord {
            VolumeRecord(id: 1 << 24, volume: "b", size: size, blockSize: block, created: 0)
        }
        try BringUp.check(record(4096, 512), isProtected: false, readOnly: false, name: "a/b")
        try BringUp.check(record(4096, 512), isProtected: true, readOnly: true, name: "a/b")
        for (size, block) in [(UInt64(0), UInt32(512)), (1000, 512), (4096, 0)] {
            #expect {
                try BringUp.check(record(size, block), isProtected: false, readOnly: false, name: "a/b")
            } throws: {
                ($0 as? BackendError)?.code == EIO
            }
        }
        #expect { try BringUp.check(record(4096, 512), isProtected: true, readOnly: false, name: "a/b") } throws: {
            let error = $0 as? BackendError
            return error?.code == EROFS && error?.message.contains("--read-only") == true
        }
    }
}
