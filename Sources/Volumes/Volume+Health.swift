import Backend
import EventLoop
import Glibc
import Logging
import NBD

/// What a volume's loop watches: how well it does, and requests that take too long.
struct Watch {
    /// Nanoseconds.
    let slowIO: UInt64
    var health: HealthMachine
    /// Seconds since 1970 when the state of health was entered.
    var since = Int64(time(nil))
    /// Armed while a request is in hand, or the state is bad.
    var timer: LoopTimer?
    /// Slow ones that were counted and not told yet.
    var untold = 0
    var lastTold: UInt64 = 0

    /// - Parameter slowIO: milliseconds.
    init(slowIO: UInt64, isReadOnly: Bool, now: UInt64) {
        self.slowIO = slowIO * 1_000_000
        health = HealthMachine(isReadOnly: isReadOnly, now: now)
    }

    /// Nanoseconds between two looks: a slow request is told when it is at most a quarter late.
    var interval: UInt64 { min(max(slowIO / 4, 5_000_000), 500_000_000) }

    /// Nanoseconds between two lines of the log: when a store stands still, many are slow.
    static let pause: UInt64 = 5_000_000_000
}

extension Volume {
    func notice(_ event: HealthEvent) {
        let before = watch.health.state
        if watch.health.handle(event, now: loop.now) { tellHealth(before) }
    }

    /// Nobody tries any more to connect the kernel. From any thread.
    func giveUpConnecting() { loop.post { [self] in notice(.gaveUp) } }

    private func tellHealth(_ before: HealthState) {
        watch.since = Int64(time(nil))
        let state = watch.health.state
        let text = "health: \(state.rawValue), was \(before.rawValue)"
        switch state {
        case .idle, .active, .readOnly:
            if before == .idle || before == .active { logger.debug("\(text)") } else { logger.notice("\(text)") }
        case .degraded, .slow, .reconnecting: logger.warning("\(text)")
        case .failed: logger.error("\(text)")
        }
    }

    func armWatch() { watch.timer?.arm(after: watch.interval) }

    func watchPassed() {
        lookForSlow()
        let before = watch.health.state
        if watch.health.tick(now: loop.now) { tellHealth(before) }
        if requests.inUse > 0 || watch.health.isBad { armWatch() }
    }

    // MARK: Failures

    /// The store failed a part.
    func noticeFailure(_ part: UnsafeMutablePointer<IO>) {
        switch (part.pointee.operation, part.pointee.status) {
        // Only that it cannot be done fast.
        case (.writeZeroes, EOPNOTSUPP): break
        case (.write, EROFS), (.writeZeroes, EROFS), (.trim, EROFS): notice(.writeProtected)
        // Another error than this is of a flush that can be tried again.
        case (.flush, EIO): notice(.flushFailed)
        default: notice(.ioFailed)
        }
    }

    /// The store has done a part, and took no writes before.
    @inline(never)
    func noticeSuccess(_ part: UnsafeMutablePointer<IO>) {
        switch part.pointee.operation {
        case .write, .writeZeroes: notice(.written)
        case .read, .trim, .flush, .cache, .extents: break
        }
    }

    /// Seconds that the answer of a failed flush waits for the state folder.
    private static let writingTimeout: UInt64 = 5

    package func flushesFail() {
        guard flushesFailSince == nil else { return }
        let since = Int64(time(nil))
        lostSince.withLock { $0 = since }
        logger.error(
            "a flush failed: what was acknowledged may be lost, and every flush fails until the volume is mapped anew")
        unanswered = []
        let timer = LoopTimer(loop: loop) { [unowned self] in
            logger.error("that flushes fail is not written down yet, after \(Self.writingTimeout) s")
            answerFailures()
        }
        timer.arm(after: Self.writingTimeout * 1_000_000_000)
        unansweredTimer = timer
        report(.flushesFail(since: since) { [self] in loop.post { [self] in answerFailures() } })
    }

    private func answerFailures() {
        unansweredTimer?.cancel()
        unansweredTimer = nil
        let parts = unanswered ?? []
        unanswered = nil
        for part in parts { finish(part) }
        loop.runAgain()
    }

    // MARK: Slow requests

    /// A request whose store took too long has been completed.
    @inline(never)
    func noticeLate(_ request: UnsafeMutablePointer<Request>) {
        if !request.pointee.isReportedSlow { tellSlow(request, "was at the store") }
        notice(.ioSlow)
    }

    /// Each slow request is counted and told once, while it waits; one that waits at the store makes the volume slow for
    /// as long as it does. Held back by a suspension is not slow.
    private func lookForSlow() {
        let now = loop.now
        var storeIsSlow = false
        requests.forEachTouched { request in
            guard request.pointee.place != .gate, request.pointee.place != .nowhere,
                now &- request.pointee.admitted > watch.slowIO
            else { return }
            if request.pointee.place == .volume, request.pointee.pendingParts > 0 { storeIsSlow = true }
            if !request.pointee.isReportedSlow { tellSlow(request, place(of: request)) }
        }
        if storeIsSlow { notice(.ioSlow) }
    }

    /// Whether no request is in hand that was there at a time. From any thread; true when the loop has ended.
    /// - Parameter time: nanoseconds, as of `monotonicNanoseconds`.
    func hasAnswered(allBefore time: UInt64) async -> Bool {
        await loop.call { [self] in
            var oldest = UInt64.max
            requests.forEachTouched { request in
                guard request.pointee.place != .nowhere, request.pointee.place != .answered else { return }
                oldest = min(oldest, request.pointee.admitted)
            }
            return oldest > time
        } ?? true
    }

    private func place(of request: UnsafeMutablePointer<Request>) -> StaticString {
        switch request.pointee.place {
        case .throttle: "waits for the volume's limits"
        case .volume where request.pointee.pendingParts > 0: "waits at the store"
        case .answered: "waits for the client to take its answer"
        case .volume, .behind, .gate, .nowhere: "waits behind others"
        }
    }

    private func tellSlow(_ request: UnsafeMutablePointer<Request>, _ place: StaticString) {
        request.pointee.isReportedSlow = true
        counters.slow &+= 1
        guard watch.lastTold == 0 || loop.now &- watch.lastTold >= Watch.pause else {
            watch.untold += 1
            return
        }
        let more = watch.untold > 0 ? "; \(watch.untold) more since the last such line" : ""
        let milliseconds = (loop.now &- request.pointee.admitted) / 1_000_000
        logger.warning(
            """
            slow: a \(request.pointee.command) of \(request.pointee.length) bytes at \(request.pointee.offset) \
            \(place), for \(milliseconds) ms\(more)
            """)
        watch.lastTold = loop.now
        watch.untold = 0
    }
}
