import CLinux
import EventLoop
import Glibc

extension Session {
    // MARK: Receiving

    /// One recv per turn: a flood on one connection leaves the others their turn.
    func receive() {
        guard !input.wantsPlace || place() else { return fail("out of memory") }
        let isPlaced = input.placed != nil
        let count = received ?? receiveOnce()
        received = nil
        if count > 0 {
            target.received(self)
            parse()
            if input.wantsPlace { beganInWait = !isPlaced && loop.lastWait >= Self.sleep }
        } else if count == 0 {
            endReason = input.isWithinRequest || dropping > 0 ? "the client closed within a request" : nil
            drain()
            hangUp()
        } else if errno != EAGAIN && errno != EINTR {
            fail("receive: \(errnoText(errno))")
        }
        expectInput()
    }

    /// - Returns: as recv(2), with `errno`.
    @inline(__always)
    private func receiveOnce(flags: Int32 = Int32(MSG_DONTWAIT)) -> Int {
        let count = input.receive(flags: flags)
        // An error may come behind some bytes, too.
        if let placed = input.placed, placed.own == nil, let header = placedHeader {
            target.payloadArrived(offset: header.offset, length: header.length)
        }
        return count
    }

    package func receiveBlocking() -> Int {
        guard !input.wantsPlace || place() else {
            // It is told when this is tried again.
            errno = ENOMEM
            return -1
        }
        let count = receiveOnce(flags: 0)
        if count >= 0 { received = count }
        return count
    }

    /// Where nothing is under way, the next event is input; the rest of a request that has begun, too, but not over TCP,
    /// where it comes in more pieces the sooner it is taken.
    @inline(__always)
    func expectInput() {
        guard inFlight == 0, !paused, isLocal || !input.isWithinRequest, let token else { return }
        loop.expectOnly(token, descriptor: descriptor)
    }

    /// Has the rest of the request at the front, a large write, received at its place.
    private func place() -> Bool {
        guard let front = input.current?.pointee.front, let header = RequestHeader.decode(front) else { return true }
        placedHeader = header
        return input.place(Int(header.length), at: target.placement(offset: header.offset, length: header.length))
    }

    /// Has the rest of a placed payload received elsewhere: nothing more lands in the volume from here on but by requests.
    package func withdrawPlacement() {
        if !closed, !input.withdrawPlacement() { fail("out of memory") }
    }

    // MARK: Parsing

    /// Handles every whole request that has arrived, as far as there are slots.
    func parse() {
        while !draining, let input = input.current {
            self.input.missing = 0
            if dropping > 0 {
                guard dropPayload(input) else { return }
                continue
            }
            if let placed = self.input.placed {
                guard placed.left == 0 else { return }
                guard acceptPlaced(placed) else { return pause() }
                continue
            }
            let available = input.pointee.available
            guard available >= RequestHeader.size else {
                if available > 0, !self.input.makeRoom(RequestHeader.size) { fail("out of memory") }
                return
            }
            guard let header = RequestHeader.decode(input.pointee.base + input.pointee.start) else {
                return fail("request with a wrong magic")
            }
            let command = Command(rawValue: header.type)
            if let refusal = limits.refusal(of: header, command) {
                guard refuse(header, command, refusal, input) else { return pause() }
            } else {
                switch command {
                case .write:
                    let whole = RequestHeader.size &+ Int(header.length)
                    guard available >= whole else {
                        self.input.missing = whole &- available
                        // A large one gets its place when the rest is received: those before it may have left theirs.
                        if !self.input.wantsPlace, !self.input.makeRoom(whole) { fail("out of memory") }
                        return
                    }
                    guard accept(header, .write, input, consuming: whole) else { return pause() }
                case .disconnect:
                    input.pointee.start = input.pointee.end
                    return drain()
                case .some(let command):
                    guard accept(header, command, input, consuming: RequestHeader.size) else { return pause() }
                case nil: return fail("request of unknown type")
                }
            }
        }
    }

    @inline(__always)
    private func accept(
        _ header: RequestHeader, _ command: Command, _ input: UnsafeMutablePointer<InputBuffer>, consuming count: Int
    ) -> Bool {
        let carriesData = command == .read || command == .write
        if carriesData, heldBytes > 0, heldBytes &+ Int(header.length) > Self.maximumHeldBytes { return false }
        guard let request = take(header, command) else { return false }
        if carriesData { heldBytes &+= Int(header.length) }
        if command == .write {
            request.pointee.payload = input.pointee.base + (input.pointee.start &+ RequestHeader.size)
            request.pointee.input = input
            input.pointee.references &+= 1
        }
        input.pointee.start &+= count
        if carriesData, !request.pointee.durable, loop.lastWait >= Self.sleep { beginReply(to: request) }
        target.submit(request)
        return true
    }

    private func acceptPlaced(_ placed: PlacedPayload) -> Bool {
        guard let header = placedHeader,
            heldBytes == 0 || heldBytes &+ Int(header.length) <= Self.maximumHeldBytes,
            let request = take(header, .write)
        else { return false }
        heldBytes &+= Int(header.length)
        request.pointee.payload = placed.base
        request.pointee.input = input.takePlaced()
        if placed.own != nil, beganInWait, !request.pointee.durable { beginReply(to: request) }
        target.submit(request)
        return true
    }

    /// Answers a request that must not reach the volume; a write's payload is thrown away first.
    private func refuse(
        _ header: RequestHeader, _ command: Command?, _ refusal: Refusal, _ input: UnsafeMutablePointer<InputBuffer>
    ) -> Bool {
        if command == .write, header.length > 0 {
            input.pointee.start &+= RequestHeader.size
            dropping = Int(header.length)
            dropped = (header, refusal)
            return true
        }
        guard answer(header, command ?? .cache, refusal) else { return false }
        input.pointee.start &+= RequestHeader.size
        return true
    }

    private func answer(_ header: RequestHeader, _ command: Command, _ refusal: Refusal) -> Bool {
        var header = header
        header.length = 0
        guard let request = take(header, command) else { return false }
        request.pointee.status = refusal.errno
        request.pointee.errorText = refusal.text
        request.reply()
        return true
    }

    /// - Returns: whether there is more to parse now.
    private func dropPayload(_ input: UnsafeMutablePointer<InputBuffer>) -> Bool {
        if dropping > 1 || dropped == nil {
            // One byte stays owed until the answer has a slot, so that a pause here comes back to the same place.
            let count = min(dropping - 1, input.pointee.available)
            input.pointee.start &+= count
            dropping -= count
        }
        guard dropping == 1, input.pointee.available > 0, let (header, refusal) = dropped else { return false }
        guard answer(header, .write, refusal) else {
            pause()
            return false
        }
        input.pointee.start &+= 1
        dropping = 0
        dropped = nil
        return true
    }

    // MARK: Backpressure

    private func pause() {
        paused = true
    }

    /// Called at the end of a turn, when replies may have freed slots.
    func resume() {
        guard inFlight < Self.maximumInFlight, !closed else { return }
        let before = inFlight
        paused = false
        parse()
        if !paused, events & EPOLLIN.rawValue == 0 { updateEvents() }
        // What was started now has missed the backend's end of turn. Where nothing was, an answer will come.
        if !paused || inFlight != before { loop.runAgain() }
    }
}
