import CLinux
import Glibc
import Synchronization

/// Lets the thread of a loop make a system call that usually takes microseconds and may take long: a buffered write. A
/// second thread stands by; when the first is away for too long, it goes on with the loop, and the first stands by when it
/// comes back. Handing each such call to another thread instead costs two wake-ups, and data that another core has in its
/// cache.
final class Relief: Sendable {
    /// Nanoseconds of absence after which the loop is gone on with, up to twice as long.
    private static let patience: UInt64 = 4_000_000
    /// Looks without a call in between, after which the one who stands by sleeps.
    private static let quietLooks = 25
    private static let termStep: UInt64 = 1 << 48

    /// Terms of leadership from bit 48 on, calls from bit 1 on; bit 0 is set during a call.
    private let state = Atomic<UInt64>(0)
    private let standsBy = Atomic<Bool>(false)
    private let sleeps = Atomic<Bool>(false)
    private let stopped = Atomic<Bool>(false)
    private let bell = Semaphore()
    /// The thread id of who leads.
    private let leader = Atomic<pid_t>(0)

    // MARK: On the leading thread

    /// Call first, when this thread begins to lead.
    func lead() { leader.store(qbd_gettid(), ordering: .releasing) }

    /// Changes when another thread takes over.
    @inline(__always)
    var term: UInt64 { state.load(ordering: .acquiring) >> 48 }

    /// Whether somebody stands by.
    @inline(__always)
    var isThere: Bool { standsBy.load(ordering: .acquiring) }

    /// Call before what may block.
    /// - Returns: for `leave`.
    @inline(__always)
    func enter() -> UInt64 {
        let inside = state.load(ordering: .relaxed) | 1
        state.store(inside, ordering: .sequentiallyConsistent)
        if sleeps.load(ordering: .sequentiallyConsistent) { wake() }
        return inside
    }

    private func wake() {
        sleeps.store(false, ordering: .relaxed)
        bell.signal()
    }

    /// - Returns: false when another thread leads by now.
    @inline(__always)
    func leave(_ inside: UInt64) -> Bool {
        // The step to the next even number counts the call.
        state.compareExchange(expected: inside, desired: inside &+ 1, ordering: .acquiringAndReleasing).exchanged
    }

    /// Sends away who stands by.
    func stop() {
        stopped.store(true, ordering: .sequentiallyConsistent)
        bell.signal()
    }

    // MARK: On the other thread

    /// - Returns: true when this thread leads now, false after `stop`.
    func standBy() -> Bool {
        standsBy.store(true, ordering: .releasing)
        var last = state.load(ordering: .acquiring)
        var looks = 0
        while !stopped.load(ordering: .sequentiallyConsistent) {
            if looks == Self.quietLooks {
                sleeps.store(true, ordering: .sequentiallyConsistent)
                if state.load(ordering: .sequentiallyConsistent) == last,
                    !stopped.load(ordering: .sequentiallyConsistent)
                {
                    bell.wait()
                }
                sleeps.store(false, ordering: .relaxed)
                looks = 0
                last = state.load(ordering: .acquiring)
                continue
            }
            let rung = bell.wait(nanoseconds: Self.patience)
            let current = state.load(ordering: .acquiring)
            guard current == last, !rung else {
                last = current
                looks = 0
                continue
            }
            looks += 1
            if current & 1 == 1, !isRunning, takeOver(current) { return true }
        }
        return false
    }

    /// Whether the leader does not wait for anything but a processor: it will be back without help.
    private var isRunning: Bool {
        let file = open("/proc/self/task/\(leader.load(ordering: .acquiring))/stat", O_RDONLY | O_CLOEXEC)
        guard file >= 0 else { return false }
        defer { close(file) }
        return withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 128) { text in
            let count = read(file, text.baseAddress, text.count)
            // "17 (name) S": the name may have anything in it.
            guard count > 0, let end = text[..<count].lastIndex(of: UInt8(ascii: ")")), end + 2 < count else {
                return false
            }
            return text[end + 2] == UInt8(ascii: "R")
        }
    }

    private func takeOver(_ inside: UInt64) -> Bool {
        // Before the other one can come back and say that it stands by.
        standsBy.store(false, ordering: .relaxed)
        let taken = state.compareExchange(
            expected: inside, desired: inside &+ 1 &+ Self.termStep, ordering: .acquiringAndReleasing
        ).exchanged
        if !taken { standsBy.store(true, ordering: .releasing) }
        return taken
    }
}
