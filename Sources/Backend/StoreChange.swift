import EventLoop
import Glibc
import Synchronization

/// What becomes of the store of a volume that is open.
package enum StoreChange: Sendable, Equatable {
    /// Nothing: files that were replaced are let go.
    case nothing
    /// Makes a snapshot of all that was completed.
    case snapshot(String)
    /// One step towards fewer files, after a snapshot was deleted.
    case tidy
}

/// A change of an open volume's store, with everything that it had to wait for. `finish` is called in any case, and last.
package protocol PreparedChange: AnyObject, Sendable {
    /// Makes the change, once. On a thread that may wait; I/O is held back, and the volume's backend closed.
    ///
    /// On an error the volume is as it was. When the hold was given up, the volume may be in use again before this
    /// returns.
    /// - Returns: the volume opened anew, to start in place of the old one, which is still to be closed.
    func apply(_ hold: Hold) throws(BackendError) -> any OpenVolume

    /// Cleans up and lets others change the pool. I/O may run. Waits for `apply` to end. On a thread that may wait.
    /// An error is one of the change itself, which counts and may not after a power cut.
    func finish() throws(BackendError)
}

/// The time for which I/O is held back. Either the change is committed in that time, or it is given up and does nothing
/// more to what others use. From any thread.
package final class Hold: Sendable {
    private enum State {
        case working
        case committed
        case givenUp(BackendError)
    }
    private let state = Mutex(State.working)

    package init() {}

    /// Does what may not be done when the change was given up, and throws then. Only what is quick: who gives up waits for
    /// it.
    package func whileWorking<Value>(_ body: () throws(BackendError) -> Value) throws(BackendError) -> Value {
        try state.withLock { (state) throws(BackendError) in
            if case .givenUp(let reason) = state { throw reason }
            return try body()
        }
    }

    /// Throws when the change was given up.
    package func check() throws(BackendError) { try whileWorking { () throws(BackendError) in } }

    /// From here on the change cannot be given up any more.
    package func commit() throws(BackendError) {
        try state.withLock { (state) throws(BackendError) in
            if case .givenUp(let reason) = state { throw reason }
            state = .committed
        }
    }

    /// - Returns: false when the change is made all the same.
    package func giveUp(_ reason: BackendError) -> Bool {
        state.withLock { state in
            if case .committed = state { return false }
            state = .givenUp(reason)
            return true
        }
    }
}

extension PreparedChange {
    /// `apply` with a limit, after which I/O goes on without the change.
    /// - Parameters:
    ///   - seconds: until then, or until the change is committed, I/O may be held back.
    ///   - name: of the volume, for the error's text.
    package func apply(within seconds: UInt64, _ name: String) async throws(BackendError) -> any OpenVolume {
        let hold = Hold()
        let end = monotonicNanoseconds() + seconds * 1_000_000_000
        return try await Aside.run {
            guard monotonicNanoseconds() >= end else { return nil }
            let late = BackendError(
                code: ETIMEDOUT,
                message: "\(name): given up, because what needs its I/O to be held back was not done within"
                    + " \(seconds) s; its disk is slow or does not answer")
            return hold.giveUp(late) ? late : nil
        } _: { [self] () throws(BackendError) in
            try apply(hold)
        }
    }
}

/// Lets somebody end a wait of somebody else.
package final class Patience: Sendable {
    private let end = Mutex<BackendError?>(nil)

    package init() {}

    /// Nil while there is some.
    package var reason: BackendError? { end.withLock { $0 } }

    package func lose(_ reason: BackendError) { end.withLock { $0 = $0 ?? reason } }
}

extension OpenVolume {
    /// `prepare` that can be given up from elsewhere. What was prepared by then is undone.
    package func prepare(_ change: StoreChange, _ patience: Patience) async throws(BackendError) -> any PreparedChange {
        try await Aside.run {
            patience.reason
        } _: { [self] () throws(BackendError) in
            let prepared = try prepare(change) { patience.reason }
            guard let reason = patience.reason else { return prepared }
            try prepared.finish()
            throw reason
        }
    }
}
