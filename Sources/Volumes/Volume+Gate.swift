import Backend
import EventLoop
import Glibc
import NBD

/// Requests that are not let through to the store.
package struct HeldBack: Sendable, Equatable {
    package enum Reason: String, Sendable {
        case suspended
        case throttle
    }

    package var count = 0
    /// Milliseconds since the oldest of them arrived.
    package var oldest: UInt64 = 0
    /// Nil when there are none.
    package var reason: Reason?
}

// Suspend and resume. What is held back is linked in the order of its arrival and keeps its slot: when slots run out,
// sessions stop reading.
extension Volume {
    // MARK: From the manager

    /// Holds back new requests; returns when none is in flight at the store.
    /// - Parameter timeout: seconds. When it has passed, the volume is as it was before, and ETIMEDOUT is thrown.
    func suspend(timeout: UInt64) async throws(BackendError) {
        let failure: BackendError? = await withCheckedContinuation { continuation in
            let accepted = loop.post { [self] in
                beginSuspend(timeout: timeout) { continuation.resume(returning: $0) }
            }
            if !accepted { continuation.resume(returning: isStopping) }
        }
        if let failure { throw failure }
    }

    /// Ends a suspend that is still waiting, as if its time had passed, and what waits before it holds I/O back. From any
    /// thread.
    func cancelSuspend(_ reason: BackendError) {
        exchanging.withLock { $0?.lose(reason) }
        loop.post { [self] in endPendingSuspend(reason) }
    }

    /// Decides what becomes of requests that are held back and of those that come.
    /// - Parameter state: anything but `suspended`.
    func resume(_ state: GateState) async throws(BackendError) {
        let done = await loop.call { [self] () -> Bool in
            guard !stopping else { return false }
            enterGate(state)
            return true
        }
        guard done == true else { throw isStopping }
    }

    var isStopping: BackendError {
        BackendError(code: ESHUTDOWN, message: "\(name) is being unmapped, or qbdd is stopping")
    }

    // MARK: Admission

    /// The way of a request while the volume is not simply open: behind what is in flight of closed connections, through
    /// the gate, and under its limits.
    @inline(never)
    func admit(_ request: UnsafeMutablePointer<Request>) {
        if !leaving.isEmpty, hasToWait(request) { return leaving.append(request) }
        switch gate.state {
        case .normal: passThrottle(request)
        case .discard: letThrough(request)
        case .suspended:
            request.pointee.place = .gate
            gate.held.append(request)
        case .error: fail(request, EIO)
        }
    }

    /// A request that may have waited goes on to the store.
    @inline(__always)
    func letThrough(_ request: UnsafeMutablePointer<Request>) {
        request.pointee.place = .volume
        request.pointee.admitted = loop.now
        issue(request)
    }

    private func fail(_ request: UnsafeMutablePointer<Request>, _ code: Int32) {
        request.pointee.status = code
        request.reply()
    }

    /// Opens or closes the gate; what was held back goes the way of the new state.
    func enterGate(_ state: GateState) {
        if state != gate.shown { gate.since = Int64(time(nil)) }
        gate.state = state
        if state == .discard, let store {
            backend = DiscardBackend(store.geometry, buffers: buffers, client: self)
        } else {
            backend = store
        }
        settleAdmission()
        guard state != .suspended else { return }
        // What waits under limits came before what waits at the gate. Answers go out at the end of this turn; no client
        // can send more because of them before.
        if state == .normal {
            letPass()
        } else {
            while let request = throttle.popFirst() { admit(request) }
        }
        while let request = gate.held.popFirst() { admit(request) }
        loop.runAgain()
    }

    /// Call when the gate, the limits, or the connections that close have changed.
    func settleAdmission() {
        needsAdmission = gate.state != .normal || !throttle.limits.areNone || !leaving.isEmpty
        // From here on nothing may reach the store without having been admitted.
        if needsAdmission { for session in sessions { session.withdrawPlacement() } }
    }

    // MARK: Suspending

    private func beginSuspend(timeout: UInt64, _ done: @escaping (BackendError?) -> Void) {
        guard !stopping else { return done(isStopping) }
        if gate.state == .suspended {
            let busy = BackendError(code: EALREADY, message: "\(name) is being suspended already")
            return done(gate.pending == nil ? nil : busy)
        }
        let timer = LoopTimer(loop: loop) { [unowned self] in
            let left = "\(atStore) request\(atStore == 1 ? " is" : "s are") still in flight at its store"
            endPendingSuspend(
                BackendError(
                    code: ETIMEDOUT,
                    message: "\(name) is not suspended: after \(timeout) s \(left); it goes on as before"))
        }
        gate.pending = Gate.PendingSuspend(previous: gate.state, timer: timer, done: done)
        gate.state = .suspended
        settleAdmission()
        timer.arm(after: timeout * 1_000_000_000)
        if atStore == 0 { storeIsQuiet() }
    }

    /// Nothing is in flight at the store.
    func storeIsQuiet() {
        guard let pending = gate.pending else { return }
        gate.pending = nil
        pending.timer.cancel()
        gate.since = Int64(time(nil))
        pending.done(nil)
    }

    private func endPendingSuspend(_ reason: BackendError) {
        guard let pending = gate.pending else { return }
        gate.pending = nil
        pending.timer.cancel()
        gate.state = pending.previous
        enterGate(pending.previous)
        pending.done(reason)
    }

    // MARK: Requests without a future

    /// A client that comes back sends again what was not answered: its request must not run a second time then, maybe
    /// after a newer write.
    func dropHeld(of session: Session) {
        if !gate.held.isEmpty { drop(gate.held.take { $0.belongs(to: session) }) }
        if throttle.waiting > 0 {
            let (reads, writes) = throttle.take(of: session)
            drop(reads)
            drop(writes)
            letPass()
        }
    }

    private func drop(_ queue: consuming RequestQueue) {
        while let request = queue.popFirst() { request.drop() }
    }

    /// The volume stops: what waits for its turn runs now; what is held back is answered with ESHUTDOWN, or dropped
    /// without an answer.
    func endHeld(failingHeld: Bool) {
        endPendingSuspend(isStopping)
        throttle.set(.none, now: loop.now)
        letPass()
        while let request = throttle.popFirst() ?? gate.held.popFirst() {
            if failingHeld { fail(request, ESHUTDOWN) } else { request.drop() }
        }
    }

    // MARK: Status

    func heldBack() -> HeldBack {
        let count = gate.held.count + throttle.waiting
        guard let oldest = throttle.oldestArrival ?? gate.held.first?.pointee.arrival else { return HeldBack() }
        return HeldBack(
            count: count, oldest: (loop.now &- oldest) / 1_000_000,
            reason: gate.state == .suspended ? .suspended : .throttle)
    }
}
