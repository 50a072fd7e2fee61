import CLinux
import EventLoop
import Glibc

extension Session {
    /// iovecs one `sendmsg` takes (IOV_MAX).
    package static let vectorCapacity = 1024

    /// Queues the reply; it is sent at the end of the turn together with the others.
    @inline(__always)
    func enqueueReply(_ request: UnsafeMutablePointer<Request>) {
        guard !closed else { return release(request) }
        request.pointee.place = .answered
        request.buildReply(structured: limits.structured)
        if let begun, begun == request.pointee.replyMagic(structured: limits.structured) {
            self.begun = nil
            request.pointee.next = firstReply
            firstReply = request
            if lastReply == nil { lastReply = request }
            return
        }
        request.pointee.next = nil
        if let lastReply { lastReply.pointee.next = request } else { firstReply = request }
        lastReply = request
    }

    /// Sends what the reply begins with, whether it will have data or an error, to a client that sleeps until it has come:
    /// the client wakes up while the request is done. As it takes that in, the kernel wakes this thread for the room there
    /// is, which wakes up while the client handles the reply and asks for more. No other reply can be sent until this one is
    /// there; an exclusive wait says that many in a row were done in their own turns.
    @inline(__always)
    func beginReply(to request: UnsafeMutablePointer<Request>) {
        guard isLocal, loop.waitsExclusively, inFlight == 1 else { return }
        let magic = request.pointee.replyMagic(structured: limits.structured)
        var bytes = magic.bigEndian
        let sent = send(descriptor, &bytes, MemoryLayout<UInt32>.size, Int32(MSG_NOSIGNAL | MSG_DONTWAIT))
        // What is wrong with the socket shows again when the reply is sent.
        guard sent > 0 else { return }
        sentOfFirst = sent
        begun = magic
    }

    /// Sends as many replies as the socket takes.
    func sendReplies() {
        while firstReply != nil {
            let unsent = gather()
            if unsent.wantsNoBlocking { loop.endExclusiveWait() }
            let sent = unsent.send(to: descriptor)
            if sent < 0 {
                if errno == EINTR { continue }
                guard errno == EAGAIN else { return fail("send: \(errnoText(errno))") }
                waitsForRoom = true
                return updateEvents()
            }
            // Never for bytes in memory: a page in a pipe that the file lost meanwhile. The header is out already.
            if sent == 0 { return fail("send: data read went away") }
            consume(sent)
            if sent < unsent.bytes {
                waitsForRoom = true
                return updateEvents()
            }
        }
    }

    /// Whether the client has replies to go on with, and is not busy with sending large writes. On a Unix socket the kernel
    /// tells what the peer has not read yet.
    @inline(__always)
    var clientIsBusy: Bool {
        guard mayRest, input.placed == nil, input.missing == 0, !input.followsLarge else { return false }
        return Int(qbd_socket_unread(descriptor)) >= unreadWhenBusy
    }

    /// Lays the unsent bytes of the queued replies out in `vectors`.
    @inline(__always)
    private func gather() -> Gathering {
        var gathering = Gathering(vectors, capacity: Self.vectorCapacity, sent: sentOfFirst)
        var next = firstReply
        while let request = next, gathering.room > 2 {
            gathering.add(UnsafeMutableRawPointer(request), request.pointee.headCount)
            if let text = request.pointee.errorText, request.pointee.status != 0 {
                gathering.add(UnsafeMutableRawPointer(mutating: text.utf8Start), text.utf8CodeUnitCount)
            }
            var segment = request.pointee.segments
            while let part = segment {
                guard gathering.room > 0 else { return gathering }
                gathering.add(part.pointee)
                segment = part.pointee.next
            }
            next = request.pointee.next
        }
        return gathering
    }

    /// Frees the replies that are wholly sent.
    @inline(__always)
    private func consume(_ sent: Int) {
        var left = sent &+ sentOfFirst
        while let request = firstReply, left >= request.pointee.replyCount {
            left &-= request.pointee.replyCount
            // Four messages of this size with what the kernel adds to each; less when one is much to do.
            unreadWhenBusy = min(4 &* (request.pointee.replyCount &+ 768), 64 << 10)
            firstReply = request.pointee.next
            // Freeing it may let others go on, which may be answered at once: the queue is in order before.
            if firstReply == nil { lastReply = nil }
            request.pointee.isSent = true
            release(request)
        }
        sentOfFirst = left
    }
}
