import CLinux
import Glibc
import Synchronization

/// Something with a file descriptor in the loop. Lives on the loop's thread.
package protocol EventSource: AnyObject {
    /// The descriptor is ready: EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLERR as epoll gives them.
    func ready(events: UInt32)
    /// Waits for input of the socket, which blocks, and keeps it for `ready`. See `expectOnly`.
    /// - Returns: as recv(2), with `errno`.
    func receiveBlocking() -> Int
}

extension EventSource {
    package func receiveBlocking() -> Int { preconditionFailure("never expected alone") }
}

/// Work at the end of every turn, after all ready descriptors were handled: submit what was collected, write once
/// per peer.
package protocol TurnObserver: AnyObject {
    func endOfTurn()
}

/// One thread, one epoll set. Every object registered here is touched by that thread alone; other threads hand it
/// closures with `post`. Who the thread is may change; see `Relief`.
package final class EventLoop: @unchecked Sendable {
    package let name: String
    /// CLOCK_MONOTONIC in nanoseconds, read once after each wait and when `updateNow` asks: good enough for time-outs
    /// and latency, and no clock call per request.
    package private(set) var now: UInt64

    private let epoll: Descriptor
    private let wake: Descriptor
    /// A timer of the kernel's: it is set when the earliest deadline changes, where a time-out of each wait would be set
    /// and cancelled with each.
    private let clock: Descriptor
    /// What it is set to; later than `timers.earliest` it never is.
    private var clockDeadline = UInt64.max
    private let threads = Mutex<[Thread]>([])
    private let relief = Relief()
    private var hasRelief = false
    /// Of `now`: until then nothing is done on this thread that may block.
    private var blockingResumes: UInt64 = 0
    /// How often this thread had waited for something before the first call of the turn that may block, and the turn.
    private var waitsBefore = 0
    private var waitsTurn = UInt64.max
    private var running = true
    private var again = false
    private var restWanted = false
    /// Whose input is all that can come next, said in this turn; and how often in a row that was so.
    private var only: (token: Token, descriptor: Int32)?
    private var onlyTurns = 0
    private let exclusiveWait: ExclusiveWait
    /// Who is waited for in recv(2), and is asleep in the epoll set; with its file status flags from before.
    private var exclusive: (token: Token, descriptor: Int32, flags: Int32)?
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
        var events: UInt32 = 0
        var source: (any EventSource)?
    }

    /// Names one descriptor in this loop's epoll set; stays unique when the descriptor number is used again.
    package struct Token: Sendable {
        let index: UInt32
        let generation: UInt32
        var data: UInt64 { UInt64(generation) << 32 | UInt64(index) }
    }

    private static let wakeData = UInt64.max
    private static let clockData = UInt64.max - 1
    private static let eventsPerWait = 64
    /// Turns in a row that belong to one source, after which the loop waits for it alone.
    private static let usualTurns = 64
    /// Nanoseconds. A few requests of a fast client; well below what a disk takes for one.
    private static let restTime = 20_000
    /// Nanoseconds; a wait this short did not sleep.
    private static let busyWait: UInt64 = 4_000
    /// Nanoseconds. A call that took longer than the first, or so long that another thread took over, is followed by a time
    /// without such calls.
    private static let slowCall: UInt64 = 1_000_000
    private static let afterSlowCall: UInt64 = 20_000_000
    private static let afterRelief: UInt64 = 1_000_000_000

    /// Creates the loop and starts its thread.
    package init(name: String) throws(SystemError) {
        self.name = name
        now = monotonicNanoseconds()
        epoll = Descriptor(try retrying("epoll_create1") { epoll_create1(Int32(EPOLL_CLOEXEC)) })
        exclusiveWait = ExclusiveWait(epoll: epoll.number)
        wake = Descriptor(try retrying("eventfd") { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) })
        clock = Descriptor(
            try retrying("timerfd_create") { timerfd_create(CLOCK_MONOTONIC, Int32(TFD_CLOEXEC | TFD_NONBLOCK)) })
        try retrying("epoll_ctl") {
            qbd_epoll_ctl(epoll.number, EPOLL_CTL_ADD, wake.number, EPOLLIN.rawValue, Self.wakeData)
        }
        try retrying("epoll_ctl") {
            qbd_epoll_ctl(epoll.number, EPOLL_CTL_ADD, clock.number, EPOLLIN.rawValue, Self.clockData)
        }
        let thread = try Thread(name: name) { [self] in work(leading: true) }
        threads.withLock { $0.append(thread) }
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
        if first { signalEvent(wake.number) }
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
        while let thread = threads.withLock({ $0.popLast() }) { thread.join() }
    }

    // MARK: On the loop's thread

    /// Adds a descriptor. The loop keeps the source until `remove`.
    package func add(_ descriptor: Int32, events: UInt32, source: any EventSource) throws(SystemError) -> Token {
        let index = freeRegistrations.popLast() ?? registrations.count
        if index == registrations.count { registrations.append(Registration()) }
        let token = Token(index: UInt32(index), generation: registrations[index].generation)
        do {
            try retrying("epoll_ctl add") { qbd_epoll_ctl(epoll.number, EPOLL_CTL_ADD, descriptor, events, token.data) }
        } catch {
            freeRegistrations.append(index)
            throw error
        }
        registrations[index].source = source
        registrations[index].events = events
        return token
    }

    /// Changes the events waited for; 0 waits for errors and hang-up alone.
    package func modify(_ token: Token, descriptor: Int32, events: UInt32) {
        registrations[Int(token.index)].events = events
        if exclusive?.token.data == token.data { return endExclusiveWait() }
        insisting("epoll_ctl mod") { qbd_epoll_ctl(epoll.number, EPOLL_CTL_MOD, descriptor, events, token.data) }
    }

    /// Removes a descriptor; call before it is closed. Events of this turn that were not delivered yet are dropped.
    package func remove(_ token: Token, descriptor: Int32) {
        if exclusive?.token.data == token.data { endExclusiveWait() }
        if only?.token.data == token.data { only = nil }
        insisting("epoll_ctl del") { qbd_epoll_ctl(epoll.number, EPOLL_CTL_DEL, descriptor, 0, 0) }
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

    /// Nanoseconds the last wait took that could sleep.
    package private(set) var lastWait: UInt64 = 0

    /// Lets work collect for some 20 microseconds before the next turn, unless something has to be done before. Each
    /// turn costs a few system calls and wake-ups; who knows that nobody waits for the next one saves them.
    package func rest() { restWanted = true }

    /// Says that nothing is under way for the source, so that its next event is input. When that turns out to be the
    /// loop's next event, time and again, it is waited for as `ExclusiveWait` says, and the socket blocks.
    @inline(__always)
    package func expectOnly(_ token: Token, descriptor: Int32) { only = (token, descriptor) }

    /// Whether the last wait was for one socket alone.
    package var waitsExclusively: Bool { exclusive != nil }

    /// Lets no socket block that did not before `expectOnly`.
    package func endExclusiveWait() {
        guard let exclusive else { return }
        self.exclusive = nil
        onlyTurns = 0
        exclusiveWait.end()
        _ = fcntl(exclusive.descriptor, F_SETFL, exclusive.flags)
        modify(
            exclusive.token, descriptor: exclusive.descriptor,
            events: registrations[Int(exclusive.token.index)].events)
    }

    /// Reads the clock again within a turn.
    @inline(__always)
    package func updateNow() { now = monotonicNanoseconds() }

    // MARK: What may block

    /// Has a second thread ready, so that `mayBlock` can be true.
    package func prepareToBlock() throws(SystemError) {
        guard !hasRelief else { return }
        let thread = try Thread(name: name) { [self] in work(leading: false) }
        threads.withLock { $0.append(thread) }
        hasRelief = true
    }

    /// Whether a call that seldom blocks may be made on this thread now.
    @inline(__always)
    package var mayBlock: Bool { hasRelief && now >= blockingResumes && relief.isThere }

    /// Call right before what may block, and only at the end of a turn.
    /// - Returns: for `leaveBlocking`.
    @inline(__always)
    package func enterBlocking() -> UInt64 {
        if waitsTurn != turnEnd {
            waitsTurn = turnEnd
            waitsBefore = qbd_thread_waits()
        }
        return relief.enter()
    }

    /// Call right behind it.
    /// - Returns: false when it took so long that another thread is the loop's by now: touch nothing that belongs to the
    ///   loop, and return.
    @inline(__always)
    package func leaveBlocking(_ call: UInt64) -> Bool {
        guard relief.leave(call) else { return false }
        let before = now
        updateNow()
        // One that was long for want of a processor has not waited.
        if now &- before > Self.slowCall, qbd_thread_waits() != waitsBefore {
            blockingResumes = now &+ Self.afterSlowCall
        }
        return true
    }

    // MARK: The threads

    private func work(leading: Bool) {
        let events = UnsafeMutablePointer<epoll_event>.allocate(capacity: Self.eventsPerWait)
        defer { events.deallocate() }
        // Timers are due when they are due, not up to 50 us later.
        qbd_set_timer_slack(1)
        var leads = leading
        while leads || relief.standBy() {
            relief.lead()
            if !leads {
                endExclusiveWait()
                waitsTurn = .max
                updateNow()
                blockingResumes = now &+ Self.afterRelief
                // The other one's turn ended in its middle.
                again = true
            }
            if run(events) { return }
            ExclusiveWait.leaveThread()
            leads = false
        }
    }

    /// - Returns: false when another thread has taken over.
    private func run(_ events: UnsafeMutablePointer<epoll_event>) -> Bool {
        let term = relief.term
        while running {
            waitForEvents(events)
            fireTimers(at: now)
            for observer in observers {
                observer.endOfTurn()
                guard relief.term == term else { return false }
            }
            turnEnd = now
            if restWanted { takeRest() }
        }
        posted.withLock { $0.closed = true }
        runPosted()
        relief.stop()
        return true
    }

    private func waitForEvents(_ events: UnsafeMutablePointer<epoll_event>) {
        let only = again ? nil : only
        self.only = nil
        if let only, onlyTurns >= Self.usualTurns, waitExclusively(for: only.token, only.descriptor) { return }
        endExclusiveWait()
        let sleeps = !again
        let count = wait(events)
        waited(sleeps: sleeps)
        let isUsual = count == 1 && only?.token.data == qbd_epoll_data(events)
        onlyTurns = isUsual ? onlyTurns &+ 1 : 0
        var woken = false
        for index in 0..<count {
            let data = qbd_epoll_data(events + index)
            if data == Self.wakeData {
                woken = true
            } else if data == Self.clockData {
                var expirations: UInt64 = 0
                _ = read(clock.number, &expirations, 8)
                clockDeadline = .max
            } else {
                deliver(qbd_epoll_events(events + index), to: data)
            }
        }
        if woken { runPosted() }
    }

    @inline(__always)
    private func waited(sleeps: Bool) {
        now = monotonicNanoseconds()
        let waited = now &- turnEnd
        isBusy = waited < Self.busyWait
        if sleeps { lastWait = waited }
    }

    /// - Returns: whether it had input or an error, and that was delivered; false when all are to be asked.
    private func waitExclusively(for token: Token, _ descriptor: Int32) -> Bool {
        guard exclusive?.token.data == token.data || beginExclusiveWait(for: token, descriptor) else {
            onlyTurns = 0
            return false
        }
        setClock()
        guard let source = registrations[Int(token.index)].source else { return false }
        let (ready, isDisturbed) = exclusiveWait.wait(for: source)
        if isDisturbed { endExclusiveWait() }
        guard ready != 0 else { return false }
        waited(sleeps: true)
        deliver(ready, to: token.data)
        return true
    }

    private func beginExclusiveWait(for token: Token, _ descriptor: Int32) -> Bool {
        endExclusiveWait()
        let events = registrations[Int(token.index)].events
        let flags = fcntl(descriptor, F_GETFL)
        guard events & EPOLLIN.rawValue != 0, events & EPOLLOUT.rawValue == 0, flags >= 0,
            fcntl(descriptor, F_SETFL, flags & ~O_NONBLOCK) == 0
        else { return false }
        // Errors are told all the same.
        modify(token, descriptor: descriptor, events: 0)
        registrations[Int(token.index)].events = events
        exclusive = (token, descriptor, flags)
        if exclusiveWait.begin() { return true }
        endExclusiveWait()
        return false
    }

    @inline(__always)
    private func deliver(_ ready: UInt32, to data: UInt64) {
        let registration = registrations[Int(truncatingIfNeeded: data & 0xffff_ffff)]
        guard registration.generation == UInt32(truncatingIfNeeded: data >> 32) else { return }
        registration.source?.ready(events: ready)
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
        var count: Int32 = 0
        if again {
            again = false
            var timeout = timespec()
            count = qbd_epoll_wait(epoll.number, events, Int32(Self.eventsPerWait), &timeout)
        } else {
            setClock()
            count = qbd_epoll_wait(epoll.number, events, Int32(Self.eventsPerWait), nil)
        }
        if count >= 0 { return Int(count) }
        if errno == EINTR { return 0 }
        var timeout = timespec()
        insisting("epoll_wait") {
            count = qbd_epoll_wait(epoll.number, events, Int32(Self.eventsPerWait), &timeout)
            return min(count, 0)
        }
        return Int(count)
    }

    @inline(__always)
    private func setClock() {
        if let deadline = timers.earliest, deadline < clockDeadline { setClock(deadline) }
    }

    private func setClock(_ deadline: UInt64) {
        // Zero would stop it.
        let time = max(deadline, 1)
        var setting = itimerspec()
        setting.it_value = timespec(tv_sec: Int(time / 1_000_000_000), tv_nsec: Int(time % 1_000_000_000))
        insisting("timerfd_settime") { timerfd_settime(clock.number, Int32(TFD_TIMER_ABSTIME), &setting, nil) }
        clockDeadline = deadline
    }

    private func runPosted() {
        var value: UInt64 = 0
        _ = read(wake.number, &value, 8)
        let work = posted.withLock { posted in
            defer { posted.work = [] }
            return posted.work
        }
        for closure in work { closure() }
    }
}
