/// How well a volume does. Good are `idle`, `active` and `readOnly`.
package enum HealthState: String, CaseIterable, Sendable {
    /// No request for a second.
    case idle
    case active
    /// It works, but requests failed, or some of its connections are lost.
    case degraded
    /// Requests take longer than they should.
    case slow
    /// No connection; a new one is being made.
    case reconnecting
    /// It does not work, and will not by itself; or writes that were acknowledged may be lost.
    case failed
    /// Takes no writes.
    case readOnly = "read-only"
}

/// What a volume's health is judged by.
package enum HealthEvent: CaseIterable, Sendable {
    /// Requests have come.
    case busy
    /// None has come for a second.
    case quiet
    /// A request waits at the store for too long.
    case ioSlow
    /// The store failed a request.
    case ioFailed
    /// The store failed a flush: what was written before may be lost, and nothing makes up for that.
    case flushFailed
    /// The store takes no writes.
    case writeProtected
    /// It has taken one again.
    case written
    /// One of several connections is lost.
    case pathLost
    /// The last connection is lost.
    case connectionLost
    /// All connections are there.
    case connected
    /// Nobody tries to connect any more.
    case gaveUp
    /// What was bad is over, and nothing bad was seen since for ``HealthMachine/debounce``.
    case settled
}

/// The health of a volume, from events and a clock that the caller reads. A state that is bad stays until it has
/// settled, so that what comes and goes does not make the state come and go.
package struct HealthMachine: Sendable {
    /// What an event does to a state.
    package enum Step: Sendable, Equatable {
        case stay
        case to(HealthState)
        /// To the good state that fits: `readOnly`, `active` or `idle`.
        case good
    }

    /// Nanoseconds.
    package static let debounce: UInt64 = 2_000_000_000

    package private(set) var state: HealthState
    /// The clock when the state was entered.
    package private(set) var since: UInt64
    private var isBusy = false
    private let isReadOnly: Bool
    /// The store took no writes, and has taken none since.
    package private(set) var refusesWrites = false
    private var isDisconnected = false
    private var lostWrites = false
    private var lastBad: UInt64

    /// - Parameter now: nanoseconds of any clock that never goes back; later calls use the same.
    package init(isReadOnly: Bool, now: UInt64) {
        state = isReadOnly ? .readOnly : .idle
        self.isReadOnly = isReadOnly
        since = now
        lastBad = now
    }

    /// The table: in a row what an event does in each state.
    package static func step(_ event: HealthEvent, in state: HealthState) -> Step {
        let (down, away, dead) = (Step.to(.degraded), Step.to(.reconnecting), Step.to(.failed))
        return switch event {
        // In the order of the columns: idle, active, degraded, slow, reconnecting, failed, read-only.
        case .busy: row(state, .to(.active), .stay, .stay, .stay, .stay, .stay, .stay)
        case .quiet: row(state, .stay, .to(.idle), .stay, .stay, .stay, .stay, .stay)
        case .ioSlow: row(state, .to(.slow), .to(.slow), .stay, .stay, .stay, .stay, .to(.slow))
        case .ioFailed: row(state, down, down, .stay, down, .stay, .stay, down)
        case .flushFailed: row(state, dead, dead, dead, dead, dead, .stay, dead)
        case .writeProtected: row(state, .to(.readOnly), .to(.readOnly), .stay, .stay, .stay, .stay, .stay)
        case .written: row(state, .stay, .stay, .stay, .stay, .stay, .stay, .good)
        case .pathLost: row(state, down, down, .stay, down, .stay, .stay, down)
        case .connectionLost: row(state, away, away, away, away, .stay, .stay, away)
        case .connected: row(state, .stay, .stay, .stay, .stay, .stay, .stay, .stay)
        case .gaveUp: row(state, dead, dead, dead, dead, dead, .stay, dead)
        case .settled: row(state, .stay, .stay, .good, .good, .good, .good, .stay)
        }
    }

    private static func row(
        _ state: HealthState, _ idle: Step, _ active: Step, _ degraded: Step, _ slow: Step, _ reconnecting: Step,
        _ failed: Step, _ readOnly: Step
    ) -> Step {
        switch state {
        case .idle: idle
        case .active: active
        case .degraded: degraded
        case .slow: slow
        case .reconnecting: reconnecting
        case .failed: failed
        case .readOnly: readOnly
        }
    }

    /// Whether `tick` is to be called from time to time.
    package var isBad: Bool {
        switch state {
        case .idle, .active, .readOnly: false
        case .degraded, .slow, .reconnecting, .failed: true
        }
    }

    /// - Returns: whether the state is another one.
    @discardableResult
    package mutating func handle(_ event: HealthEvent, now: UInt64) -> Bool {
        switch event {
        case .busy: isBusy = true
        case .quiet: isBusy = false
        case .writeProtected: refusesWrites = true
        case .written: refusesWrites = false
        case .ioSlow, .ioFailed: lastBad = now
        case .flushFailed: (lostWrites, lastBad) = (true, now)
        case .pathLost, .connectionLost, .gaveUp: (isDisconnected, lastBad) = (true, now)
        case .connected:
            // From here on, not from the loss on, it has to be good for a while.
            if isDisconnected { lastBad = now }
            isDisconnected = false
        case .settled: break
        }
        let next: HealthState
        switch Self.step(event, in: state) {
        case .stay: return false
        case .to(let other): next = other
        case .good: next = isReadOnly || refusesWrites ? .readOnly : isBusy ? .active : .idle
        }
        guard next != state else { return false }
        state = next
        since = now
        return true
    }

    /// Lets a bad state settle when it is time.
    /// - Returns: whether the state is another one.
    package mutating func tick(now: UInt64) -> Bool {
        guard isBad, !isDisconnected, !lostWrites, now >= lastBad + Self.debounce else { return false }
        return handle(.settled, now: now)
    }
}
