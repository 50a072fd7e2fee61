import CLinux
import Glibc
import Synchronization

/// Lets a loop wait in recv(2) for the one socket that always has its next event, instead of in epoll_wait(2): a sender
/// wakes who sleeps there in a fraction of the time. Whatever else the loop's epoll set has to say ends that wait: the
/// lookout, a thread of the process, is told of it and sends the waiting thread a signal.
final class ExclusiveWait: Sendable {
    private enum State {
        static let idle: UInt8 = 0
        /// The set has something to say; nobody waits, and the next wait does not begin.
        static let noted: UInt8 = 1
        static let waiting: UInt8 = 2
        /// The set has something to say, and signals are sent.
        static let disturbed: UInt8 = 3
        /// The waiting thread knows.
        static let left: UInt8 = 4
    }

    private let state = Atomic<UInt8>(State.idle)
    /// The thread id of who waits.
    private let thread = Atomic<pid_t>(0)
    /// The loop's epoll set.
    fileprivate let epoll: Int32

    init(epoll: Int32) { self.epoll = epoll }

    // MARK: On the loop's thread

    /// Call before the first of some waits, and `end` behind the last of them.
    /// - Returns: false when they are not possible now.
    func begin() -> Bool {
        // One that is disturbed still gets signals.
        let current = state.load(ordering: .acquiring)
        guard current == State.idle || current == State.noted, let lookout = Lookout.shared else { return false }
        state.store(State.idle, ordering: .sequentiallyConsistent)
        thread.store(qbd_gettid(), ordering: .sequentiallyConsistent)
        Lookout.letSignalsThrough(true)
        return lookout.watch(self)
    }

    /// Call behind the last of them, on the same thread, or on that which took the loop over.
    func end() {
        Lookout.shared?.forget(self)
        Lookout.letSignalsThrough(false)
    }

    /// Call when another thread has taken the loop over.
    static func leaveThread() { Lookout.letSignalsThrough(false) }

    /// Waits for input of a socket that blocks; `begin` was called.
    /// - Returns: EPOLLIN when there is some, an end of it included, or EPOLLERR; 0 for neither. And whether something else
    ///   has ended the wait, in any case: it is not told again.
    @inline(__always)
    func wait(for source: any EventSource) -> (ready: UInt32, isDisturbed: Bool) {
        guard exchange(State.idle, for: State.waiting) else { return (0, true) }
        let count = source.receiveBlocking()
        // An error of the socket is told once.
        let failed = count < 0 && errno != EINTR && errno != EAGAIN && errno != ENOMEM
        let isDisturbed = !exchange(State.waiting, for: State.idle)
        if isDisturbed { state.store(State.left, ordering: .sequentiallyConsistent) }
        return (failed ? EPOLLERR.rawValue : count >= 0 ? EPOLLIN.rawValue : 0, isDisturbed)
    }

    // MARK: On the lookout's thread

    /// Ends the wait, or the next one before it begins.
    fileprivate func disturb() {
        while true {
            switch state.load(ordering: .sequentiallyConsistent) {
            case State.idle: if exchange(State.idle, for: State.noted) { return }
            case State.waiting: if exchange(State.waiting, for: State.disturbed) { return interrupt() }
            default: return
            }
        }
    }

    /// A signal that comes right before the system call does not end it, so that one may not be enough.
    private func interrupt() {
        while state.load(ordering: .sequentiallyConsistent) == State.disturbed {
            _ = qbd_signal_thread(thread.load(ordering: .sequentiallyConsistent), Lookout.signal)
            var pause = timespec(tv_sec: 0, tv_nsec: 50_000)
            clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, nil)
        }
        state.store(State.idle, ordering: .sequentiallyConsistent)
    }

    private func exchange(_ expected: UInt8, for desired: UInt8) -> Bool {
        state.compareExchange(expected: expected, desired: desired, ordering: .sequentiallyConsistent).exchanged
    }
}

/// The thread that looks at the epoll sets of loops that wait for one socket.
private final class Lookout: Sendable {
    /// nil where the system refuses what it needs.
    static let shared: Lookout? = try? Lookout()
    /// Ignored where nobody handles it, so that no stray one does harm.
    static let signal = SIGURG

    private let epoll: Descriptor
    /// By their epoll sets.
    private let waits = Mutex<[Int32: ExclusiveWait]>([:])

    private init() throws(SystemError) {
        var action = sigaction()
        action.__sigaction_handler.sa_handler = { _ in }
        // Without SA_RESTART: system calls are to end.
        try retrying("sigaction") { sigaction(Self.signal, &action, nil) }
        epoll = Descriptor(try retrying("epoll_create1") { epoll_create1(Int32(EPOLL_CLOEXEC)) })
        try Thread(name: "lookout") { [self] in look() }.detach()
    }

    /// Threads are started with all signals blocked.
    static func letSignalsThrough(_ through: Bool) {
        var set = sigset_t()
        sigemptyset(&set)
        sigaddset(&set, signal)
        pthread_sigmask(through ? SIG_UNBLOCK : SIG_BLOCK, &set, nil)
    }

    /// Disturbs the wait as soon as its set has something to say, once.
    func watch(_ wait: ExclusiveWait) -> Bool {
        waits.withLock { $0[wait.epoll] = wait }
        let events = EPOLLIN.rawValue | EPOLLONESHOT.rawValue
        return qbd_epoll_ctl(epoll.number, EPOLL_CTL_ADD, wait.epoll, events, UInt64(wait.epoll)) == 0
    }

    func forget(_ wait: ExclusiveWait) {
        _ = qbd_epoll_ctl(epoll.number, EPOLL_CTL_DEL, wait.epoll, 0, 0)
        waits.withLock { $0[wait.epoll] = nil }
    }

    private func look() -> Never {
        var event = epoll_event()
        while true {
            guard qbd_epoll_wait(epoll.number, &event, 1, nil) == 1 else { continue }
            let set = Int32(truncatingIfNeeded: qbd_epoll_data(&event))
            // One that was forgotten meanwhile has ended.
            if let wait = waits.withLock({ $0[set] }) { wait.disturb() }
        }
    }
}
