import Backend
import EventLoop
import Glibc
import Synchronization

extension Volume {
    /// Seconds until requests in flight are given up waiting for.
    private static let exchangeTimeout: UInt64 = 30

    /// Seconds that the change itself may take then.
    private static let changeTimeout: UInt64 = 15
    /// Seconds that a command waits for the clearing up after it, which goes on by itself.
    private static let clearingTimeout: UInt64 = 30

    /// Has the store changed while nothing is in flight at it, and goes on with what it is then. Clients see a pause.
    ///
    /// What may have to be waited for comes before the pause, and ends when `cancelSuspend` is called; the pause has a
    /// limit. When the change fails, the volume goes on as before. When its store cannot be started again after it, all
    /// I/O fails with EIO until the volume is mapped anew.
    /// - Parameter blocking: closes what was there, where there can be no thread for that alone.
    func exchangeStore(_ change: StoreChange, on blocking: BlockingThread) async throws(BackendError) {
        let old = opened
        let patience = Patience()
        exchanging.withLock { $0 = patience }
        defer { exchanging.withLock { $0 = nil } }
        // While I/O still runs, so that less is left for the pause; and before the pool is locked, for others' sake.
        try await Aside.run {
            patience.reason
        } _: { () throws(BackendError) in
            try old.settle()
        }
        let prepared = try await old.prepare(change, patience)
        let failure: BackendError?
        do throws(BackendError) {
            try await Aside.run {
                patience.reason
            } _: { () throws(BackendError) in
                try old.settle()
            }
            try await exchangeHeld(prepared, old, on: blocking)
            failure = nil
        } catch { failure = error }
        let ending = Mutex<BackendError?>(nil)
        let clearing = Task {
            do throws(BackendError) {
                try await Aside.run { () throws(BackendError) in try prepared.finish() }
            } catch { ending.withLock { $0 = error } }
        }
        _ = await clearing.isDone(within: Self.clearingTimeout)
        if let error = failure ?? ending.withLock({ $0 }) { throw error }
    }

    private func exchangeHeld(
        _ prepared: any PreparedChange, _ old: any OpenVolume, on blocking: BlockingThread
    ) async throws(BackendError) {
        let before = try await holdBack()
        _ = await loop.call { [self] in store?.close() }
        var failure: BackendError?
        var new: (any OpenVolume)?
        do throws(BackendError) { new = try await prepared.apply(within: Self.changeTimeout, name) } catch {
            failure = error
            _ = await loop.call { old.changeGivenUp() }
        }
        let next = new ?? old
        let notStarted = await loop.call { [self] in startStore(next) }
        if new != nil {
            currentlyOpened.withLock { $0 = next }
            await BlockingThread.always(on: blocking) { old.close() }
        }
        try await letGo(before)
        if let error = failure ?? notStarted ?? nil { throw error }
    }

    /// Suspends the volume's I/O, unless it is already.
    /// - Returns: how the gate was, for `letGo`.
    private func holdBack() async throws(BackendError) -> (state: GateState, since: Int64) {
        guard let before = await loop.call({ [self] in (gate.state, gate.since) }) else { throw isStopping }
        if before.0 != .suspended { try await suspend(timeout: Self.exchangeTimeout) }
        return before
    }

    private func letGo(_ before: (state: GateState, since: Int64)) async throws(BackendError) {
        guard before.state != .suspended else { return }
        try await resume(before.state)
        _ = await loop.call { [self] in gate.since = before.since }
    }

    /// Holds all I/O back while something is done elsewhere that is to see one moment of the volume: what was answered
    /// before and nothing of what comes after. Clients see a pause, which has a limit; whatever happens, I/O goes on.
    /// - Parameter work: its value is dropped, and ETIMEDOUT thrown, when it lasts for longer than I/O may be held back.
    func whileHeldBack<Value: Sendable>(
        _ work: @escaping @Sendable () throws(BackendError) -> Value
    ) async throws(BackendError) -> Value {
        let patience = Patience()
        exchanging.withLock { $0 = patience }
        defer { exchanging.withLock { $0 = nil } }
        let before = try await holdBack()
        let end = monotonicNanoseconds() + Self.changeTimeout * 1_000_000_000
        let name = name
        let givenUp = { @Sendable (code: Int32, why: String) in
            BackendError(
                code: code,
                message:
                    "\(name): \(why); it may still be done, and is not of one moment then: look for it, and delete it")
        }
        let result: Result<Value, BackendError>
        do throws(BackendError) {
            result = .success(
                try await Aside.run(
                    watch: {
                        if let reason = patience.reason {
                            return givenUp(reason.code, "something else was asked meanwhile")
                        }
                        guard monotonicNanoseconds() >= end else { return nil }
                        return givenUp(
                            ETIMEDOUT, "not done within the \(Self.changeTimeout) s for which its I/O is held back")
                    }, work))
        } catch { result = .failure(error) }
        try await letGo(before)
        return try result.get()
    }

    /// In place of a store that was closed, which answers with errors if this fails.
    private func startStore(_ opened: any OpenVolume) -> BackendError? {
        // The backend's end of turn comes first, as at the beginning.
        loop.unobserve(self)
        defer { loop.observe(self) }
        do throws(BackendError) {
            store = try opened.start(on: loop, buffers: buffers, client: self)
            return nil
        } catch { return error }
    }
}
