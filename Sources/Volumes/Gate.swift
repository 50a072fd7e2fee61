import Backend
import EventLoop
import NBD

/// What becomes of a volume's I/O.
package enum GateState: String, Sendable, Codable, CaseIterable {
    /// It runs.
    case normal
    /// It is held back, in the order of its arrival.
    case suspended
    /// It fails with EIO.
    case error
    /// It is answered with success; writes go nowhere, reads return zeros.
    case discard
}

/// Requests in the order they came, linked through themselves: as many as there are slots, and nothing is allocated.
struct RequestQueue {
    private(set) var first: UnsafeMutablePointer<Request>?
    private var last: UnsafeMutablePointer<Request>?
    private(set) var count = 0

    var isEmpty: Bool { first == nil }

    mutating func append(_ request: UnsafeMutablePointer<Request>) {
        request.pointee.next = nil
        if let last { last.pointee.next = request } else { first = request }
        last = request
        count &+= 1
    }

    mutating func popFirst() -> UnsafeMutablePointer<Request>? {
        guard let request = first else { return nil }
        first = request.pointee.next
        if first == nil { last = nil }
        request.pointee.next = nil
        count &-= 1
        return request
    }

    /// Takes out what a condition holds for; both parts keep their order.
    mutating func take(where isTaken: (UnsafeMutablePointer<Request>) -> Bool) -> RequestQueue {
        var taken = RequestQueue()
        var kept = RequestQueue()
        while let request = popFirst() {
            if isTaken(request) { taken.append(request) } else { kept.append(request) }
        }
        self = kept
        return taken
    }
}

/// Where a volume's requests are let through, held back or turned away. On the volume's loop.
struct Gate {
    /// What is done to requests now.
    var state: GateState
    /// Seconds since 1970 when the state that is shown was entered.
    var since: Int64
    var held = RequestQueue()
    /// A suspend that waits for what is in flight at the store.
    var pending: PendingSuspend?

    struct PendingSuspend {
        /// What the volume goes back to when it takes too long.
        let previous: GateState
        let timer: LoopTimer
        /// Called once.
        let done: (BackendError?) -> Void
    }

    /// A volume counts as suspended when nothing of it is in flight any more.
    var shown: GateState { pending?.previous ?? state }
}
