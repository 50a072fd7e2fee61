import CLinux
import EventLoop
import Glibc
import NBD

/// Connections that are closed, or that their client has left, and what of theirs is still in flight.
struct LeavingSessions {
    /// How many of the kernel's.
    fileprivate(set) var kernel = 0
    /// Those of other clients.
    fileprivate(set) var clients: ContiguousArray<Session> = []
    /// Requests of others that wait for theirs, oldest first.
    private var firstWaiting: UnsafeMutablePointer<Request>?
    private var lastWaiting: UnsafeMutablePointer<Request>?

    var isEmpty: Bool { kernel == 0 && clients.isEmpty }

    var hasWaiting: Bool { firstWaiting != nil }

    mutating func append(_ request: UnsafeMutablePointer<Request>) {
        request.pointee.place = .behind
        request.pointee.next = nil
        if let last = lastWaiting { last.pointee.next = request } else { firstWaiting = request }
        lastWaiting = request
    }

    /// - Returns: the first of those that waited, linked.
    fileprivate mutating func takeWaiting() -> UnsafeMutablePointer<Request>? {
        defer { (firstWaiting, lastWaiting) = (nil, nil) }
        return firstWaiting
    }
}

// Who loses a connection sends what was in flight on it again on another: the kernel does, and clients that reconnect do.
// The first copy of a request may still be under way in the backend then. If it landed after the second was answered, it
// could undo a newer write to the same blocks. So:
// - requests of a closed connection that have not begun never begin;
// - of the kernel, requests of other connections begin when nothing of a closed one is in flight;
// - of other clients, who are not known to be the same, only what changes the same bytes waits, until it is answered. A
//   client that has said that it sends no more may want its answers all the same: its connection counts as left when there
//   is another, and what it sent that there is no room for by then never begins.
extension Volume {
    package func sessionClosed(_ session: Session) {
        dropHeld(of: session)
        let isKernel = session.peer == KernelSide.peer
        if isKernel { leaving.kernel += 1 } else { noticeLeaving(session) }
        settleAdmission()
        var next = leaving.takeWaiting()
        while let request = next {
            next = request.pointee.next
            if request.pointee.isAbandoned { request.reply() } else { leaving.append(request) }
        }
        if isKernel { kernelSessionClosed(session) }
    }

    /// Call before a client's new connection is served: it may be one that has just left another.
    func noticeHungUp() {
        for session in sessions where !session.closed && session.peer != KernelSide.peer {
            var end = pollfd(fd: session.descriptor, events: Int16(EPOLLRDHUP.rawValue), revents: 0)
            if poll(&end, 1, 0) > 0 { leave(session) }
        }
        settleAdmission()
    }

    package func clientHungUp(_ session: Session) {
        guard session.peer != KernelSide.peer,
            sessions.contains(where: { $0 !== session && !$0.closed && $0.peer != KernelSide.peer })
        else { return }
        leave(session)
        settleAdmission()
    }

    private func leave(_ session: Session) {
        session.finish()
        noticeLeaving(session)
    }

    private func noticeLeaving(_ session: Session) {
        guard session.inFlight > 0, !leaving.clients.contains(where: { $0 === session }) else { return }
        leaving.clients.append(session)
    }

    /// Whether the request must not begin before what is in flight of those that leave.
    func hasToWait(_ request: UnsafeMutablePointer<Request>) -> Bool {
        if leaving.kernel > 0 { return true }
        guard request.pointee.command.changesData else { return false }
        let start = request.pointee.offset
        let end = start + UInt64(request.pointee.length)
        // One that leaves itself waits for those that left before it: no two wait for each other.
        let left = leaving.clients.prefix { !request.belongs(to: $0) }
        var waits = false
        requests.forEachTouched { other in
            guard !waits, other.pointee.mayChangeData, other.pointee.offset < end,
                other.pointee.offset + UInt64(other.pointee.length) > start
            else { return }
            waits = left.contains { other.belongs(to: $0) }
        }
        return waits
    }

    /// Call at the end of a turn in which requests may have been answered.
    func admitWaiting() {
        var next = leaving.takeWaiting()
        var moved = false
        while let request = next {
            next = request.pointee.next
            admit(request)
            if request.pointee.place != .behind { moved = true }
        }
        // What was begun now has missed the backend's end of turn.
        if moved { loop.runAgain() }
    }

    /// - Parameter ended: sessions that are closed and have nothing in flight any more.
    func haveLeft(_ ended: ContiguousArray<Session>) {
        guard !leaving.isEmpty else { return }
        leaving.kernel -= ended.count { $0.peer == KernelSide.peer }
        leaving.clients.removeAll { session in ended.contains { $0 === session } }
        settleAdmission()
    }
}
