import CLinux
import Glibc
import Synchronization

/// Something with a file descriptor in the loop. Lives on the loop's thread.
package protocol EventSource: AnyObject {
    /// The descriptor is ready: EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLERR as epoll gives them.
    func ready(events: UInt32)
}

/// Work at the end of every turn, after all ready descriptors were handled: submit what was collected, write once
/// per peer.
package protocol TurnObserver: AnyObject {
    func endOfTurn()
}

/// One thread, one epoll set. Every object registered here is touched by that thread alone; other threads hand it
/// closures with `post`.
package final class EventLoop: @unchecked Sendable {
    package let name: String
    /// CLOCK_MONOTONIC in nanoseconds, read once after each wait and when `updateNow` asks: good enough for time-outs
    /// and latency, and no clock call per request.
    package private(set) var now: UInt64

    private let epoll: Int32
    private let wake: Int32
    private var thread: Thread?
    private var running = true
    private var again = false
    private var restWanted = false
    /// When the last turn ended.
    private var turnEnd: UInt64 = 0
    private var registrations: [Registration] = []
    private var freeRegistrations: [Int] = []
    private var observers: [any TurnObserver] = []
    var timers = TimerHeap()
    private let posted = Mutex(Posted())

    private struct Posted {
        var work: [@Sendable () -> Void] = []
        var closed = false
    }

    private struct Registration {
        var generation: UInt32 = 0
        var source: (any EventSource)?
    }

    /// Names one descriptor in this loop's epoll set; stays unique when the descriptor number is used again.
    package struct Token: Sendable {
        let index: UInt32
        let generation: UInt32
        var data: UInt64 { UInt64(generation) << 32 | UInt64(index) }
    }

    private static let wakeData = UInt64.max
    private static let eventsPerWait = 64
    /// Nanoseconds. A few requests of a fast client; well below what a disk takes for one.
    private static let restTime = 20_000
    /// Nanoseconds; a wait this short did not sleep.
    private static let busyWait: UInt64 = 4_000

    /// Creates the loop and starts its thread.
    package init(name: String) throws(SystemError) {
        self.name = name
        now = monotonicNanoseconds()
        epoll = try retrying("epoll_create1") { epoll_create1(Int32(EPOLL_CLOEXEC)) }
        wake = try retrying("eventfd") { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }
        try retrying("epoll_ctl") {
            qbd_epoll_ctl(epoll, EPOLL_CTL_ADD, wake, EPOLLIN.rawValue, Self.wakeData)
        }
        thread = try Thread(name: name) { [self] in run() }
    }

    deinit {
        Glibc.close(epoll)
        Glibc.close(wake)
    }

    // MARK: From any thread

    /// Runs a closure on the loop's thread, in the order posted.
    /// - Returns: false when the loop has stopped; the closure is dropped then.
    @discardableResult
    package func post(_ work: @escaping @Sendable () -> Void) -> Bool {
        let (accepted, first) = posted.withLock { posted -> (Bool, Bool) in
            if posted.closed { return (false, false) }
            posted.work.append(work)
            return (true, posted.work.count == 1)
        }
        if first {
            var one: UInt64 = 1
            // Only EAGAIN is possible, and it means that the loop is about to wake up anyway.
            _ = write(wake, &one, 8)
        }
        return accepted
    }

    /// Runs a closure on the loop's thread and awaits its value; nil when the loop has stopped.
    package func call<Value: Sendable>(_ work: @escaping @Sendable () -> Value) async -> Value? {
        let answer = Answer<Value?>()
        await withCheckedContinuation { continuation in
            let accepted = post {
                answer.set(work())
                continuation.resume()
            }
            if !accepted { continuation.resume() }
        }
        return answer.take { nil }
    }

    /// Stops the loop after the closures posted before, and waits for its thread. Sources must be removed before.
    package func stop() {
        post { [self] in running = false }
        thread?.join()
    }

    // MARK: On the loop's thread

    /// Adds a descriptor. The loop keeps the source until `remove`.
    package func add(_ descriptor: Int32, events: UInt32, source: any EventSource) throws(SystemError) -> Token {
        let index = freeRegistrations.popLast() ?? registrations.count
        if index == registrations.count { registrations.append(Registration()) }
        let token = Token(index: UInt32(index), generation: registrations[index].generation)
        do {
            try retrying("epoll_ctl add") { qbd_epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, events, token.data) }
        } catch {
            freeRegistrations.append(index)
            throw error
        }
        registrations[index].source = source
        return token
    }

    /// Changes the events waited for; 0 waits for errors and hang-up alone.
    package func modify(_ token: Token, descriptor: Int32, events: UInt32) {
        let result = qbd_epoll_ctl(epoll, EPOLL_CTL_MOD, descriptor, events, token.data)
        precondition(result == 0, "epoll_ctl mod: \(errnoText(errno))")
    }

    /// Removes a descriptor; call before it is closed. Events of this turn that were not delivered yet are dropped.
    package func remove(_ token: Token, descriptor: Int32) {
        let result = qbd_epoll_ctl(epoll, EPOLL_CTL_DEL, descriptor, 0, 0)
        precondition(result == 0, "epoll_ctl del: \(errnoText(errno))")
        registrations[Int(token.index)].source = nil
        registrations[Int(token.index)].generation &+= 1
        freeRegistrations.append(Int(token.index))
    }

    /// Adds an observer; they run in the order added.
    package func observe(_ observer: any TurnObserver) { observers.append(observer) }

    package func unobserve(_ observer: any TurnObserver) { observers.removeAll { $0 === observer } }

    /// Makes the next turn come without waiting: something was put back that the end of this turn may have missed.
    package func runAgain() { again = true }

    /// Whether this turn began right after the last one, without sleep.
    package private(set) var isBusy = false

    /// Lets work collect for some 20 microseconds before the next turn, unless something has to be done before. Each
    /// turn costs a few system calls and wake-ups; who knows that nobody waits for the next one saves them.
    package func rest() { restWanted = true }

    /// Reads the clock again within a turn.
    @inline(__always)
    package func updateNow() { now = monotonicNanoseconds() }

    // MARK: The thread

    private func run() {
        let events = UnsafeMutablePointer<epoll_event>.allocate(capacity: Self.eventsPerWait)
        defer { events.deallocate() }
        // Timers are due when they are due, not up to 50 us later.
        qbd_set_timer_slack(1)
        while running {
            let count = wait(events)
            now = monotonicNanoseconds()
            isBusy = now &- turnEnd < Self.busyWait
            var woken = false
            for index in 0..<count {
                let data = qbd_epoll_data(events + index)
                if data == Self.wakeData {
                    woken = true
                    continue
                }
                let registration = registrations[Int(truncatingIfNeeded: data & 0xffff_ffff)]
                guard registration.generation == UInt32(truncatingIfNeeded: data >> 32) else { continue }
                registration.source?.ready(events: qbd_epoll_events(events + index))
            }
            if woken { runPosted() }
            fireTimers(at: now)
            for observer in observers { observer.endOfTurn() }
            turnEnd = now
            if restWanted { takeRest() }
        }
        posted.withLock { $0.closed = true }
        runPosted()
    }

    private func takeRest() {
        restWanted = false
        guard !again else { return }
        var time = timespec(tv_sec: 0, tv_nsec: Self.restTime)
        // A signal may cut it short, as it may.
        clock_nanosleep(CLOCK_MONOTONIC, 0, &time, nil)
        turnEnd = monotonicNanoseconds()
    }

    @inline(__always)
    private func wait(_ events: UnsafeMutablePointer<epoll_event>) -> Int {
        var timeout = timespec()
        let count: Int32
        if again {
            again = false
            count = qbd_epoll_wait(epoll, events, Int32(Self.eventsPerWait), &timeout)
        } else if let deadline = timers.earliest {
            let time = monotonicNanoseconds()
            let left = deadline > time ? deadline - time : 0
            timeout.tv_sec = Int(left / 1_000_000_000)
            timeout.tv_nsec = Int(left % 1_000_000_000)
            count = qbd_epoll_wait(epoll, events, Int32(Self.eventsPerWait), &timeout)
        } else {
            count = qbd_epoll_wait(epoll, events, Int32(Self.eventsPerWait), nil)
        }
        if count >= 0 { return Int(count) }
        precondition(errno == EINTR, "epoll_wait: \(errnoText(errno))")
        return 0
    }

    private func runPosted() {
        var value: UInt64 = 0
        _ = read(wake, &value, 8)
        let work = posted.withLock { posted in
            defer { posted.work = [] }
            return posted.work
        }
        for closure in work { closure() }
    }
}
