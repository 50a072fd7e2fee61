import CLinux
import EventLoop
import Glibc

extension Session {
    // MARK: Receiving

    /// One recv per turn: a flood on one connection leaves the others their turn.
    func receive() {
        guard let input = roomToReceive(), missing <= Self.largePayload || placeFirst(input) else {
            return fail("out of memory")
        }
        var count: Int
        if let left = placement?.left, left > 0 {
            count = receiveInPlace(left, input)
        } else {
            count = recv(
                descriptor, input.pointee.base + input.pointee.end, input.pointee.room, Int32(MSG_DONTWAIT))
            if count > 0 { input.pointee.end &+= count }
        }
        if count > 0 {
            target.received(self)
            parse()
        } else if count == 0 {
            let within = input.pointee.available > 0 || dropping > 0 || placement != nil
            endReason = within ? "the client closed within a request" : nil
            drain()
        } else if errno != EAGAIN && errno != EINTR {
            fail("receive: \(errnoText(errno))")
        }
    }

    /// The rest of a payload at its place, and the next header behind it in the input.
    private func receiveInPlace(_ left: Int, _ input: UnsafeMutablePointer<Input>) -> Int {
        guard let placement else { return 0 }
        vectors[0] = iovec(iov_base: placement.base + placement.received, iov_len: left)
        vectors[1] = iovec(
            iov_base: input.pointee.base + input.pointee.end, iov_len: min(input.pointee.room, RequestHeader.size))
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = 2
        let count = recvmsg(descriptor, &message, Int32(MSG_DONTWAIT))
        if count > 0 {
            self.placement?.received += min(count, left)
            input.pointee.end &+= max(count - left, 0)
        }
        return count
    }

    private func roomToReceive() -> UnsafeMutablePointer<Input>? {
        guard let input else { return needInput(0) }
        if input.pointee.available == 0 {
            if input.pointee.references == 0 {
                input.pointee.start = 0
                input.pointee.end = 0
                return input
            }
            if input.pointee.room < input.pointee.capacity / 4 { return replaceInput(0) }
        }
        return input.pointee.room > 0 ? input : replaceInput(0)
    }

    /// The current input, or a first one of at least `count` bytes.
    func needInput(_ count: Int) -> UnsafeMutablePointer<Input>? {
        if let input { return input }
        input = Input.allocate(count, from: buffers)
        return input
    }

    /// A new current input of at least `count` bytes that begins with what is unparsed in the old one.
    private func replaceInput(_ count: Int) -> UnsafeMutablePointer<Input>? {
        let old = input
        input = nil
        guard let new = needInput(count) else {
            input = old
            return nil
        }
        guard let old else { return new }
        let rest = old.pointee.available
        new.pointee.base.copyMemory(from: old.pointee.base + old.pointee.start, byteCount: rest)
        new.pointee.end = rest
        old.pointee.start = old.pointee.end
        if old.pointee.references == 0 { retire(old) }
        return new
    }

    func retire(_ input: UnsafeMutablePointer<Input>) {
        buffers.free(input.pointee.buffer)
    }

    /// Makes sure that `count` bytes from the first unparsed one fit in one piece.
    private func makeRoom(_ count: Int) -> Bool {
        guard let input else { return false }
        if input.pointee.capacity &- input.pointee.start >= count { return true }
        if input.pointee.references == 0, input.pointee.capacity >= count {
            let rest = input.pointee.available
            memmove(input.pointee.base, input.pointee.base + input.pointee.start, rest)
            input.pointee.start = 0
            input.pointee.end = rest
            return true
        }
        return replaceInput(count) != nil
    }

    // MARK: Parsing

    /// Handles every whole request that has arrived, as far as there are slots.
    func parse() {
        while !draining, let input {
            missing = 0
            if dropping > 0 {
                guard dropPayload(input) else { return }
                continue
            }
            if let placed = placement {
                guard placed.left == 0 else { return }
                guard acceptPlaced(placed) else { return pause() }
                continue
            }
            let available = input.pointee.available
            guard available >= RequestHeader.size else {
                if available > 0, !makeRoom(RequestHeader.size) { fail("out of memory") }
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
                        missing = whole &- available
                        // A large one gets its place when the rest is received: those before it may have left theirs.
                        if missing <= Self.largePayload, !makeRoom(whole) { fail("out of memory") }
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
        _ header: RequestHeader, _ command: Command, _ input: UnsafeMutablePointer<Input>, consuming count: Int
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
        target.submit(request)
        return true
    }

    /// Moves what has arrived of the first request, a large write, to its place, or to a piece of memory of its own, where
    /// the rest will follow: aligned, it is copied on at full speed.
    /// - Returns: false when there is no memory.
    private func placeFirst(_ input: UnsafeMutablePointer<Input>) -> Bool {
        let front = input.pointee.base + input.pointee.start
        guard placement == nil, let header = RequestHeader.decode(front) else { return true }
        var own: UnsafeMutablePointer<Input>?
        var base = target.placement(offset: header.offset, length: header.length)
        if base == nil {
            own = Input.allocate(Int(header.length), from: buffers)
            base = own?.pointee.base
        }
        guard let base else { return false }
        let received = input.pointee.available &- RequestHeader.size
        base.copyMemory(from: front + RequestHeader.size, byteCount: received)
        input.pointee.start = input.pointee.end
        missing = 0
        placement = Placement(header: header, base: base, received: received, own: own)
        return true
    }

    /// Receives the rest of a placed payload into a piece of memory of its own, what has arrived of it with it: nothing
    /// more lands at its place from here on. What did land stays there, as of any write that was cut off.
    package func withdrawPlacement() {
        guard let placed = placement, placed.own == nil, !closed else { return }
        guard let own = Input.allocate(Int(placed.header.length), from: buffers) else { return fail("out of memory") }
        own.pointee.base.copyMemory(from: placed.base, byteCount: placed.received)
        placement = Placement(header: placed.header, base: own.pointee.base, received: placed.received, own: own)
    }

    private func acceptPlaced(_ placed: Placement) -> Bool {
        guard heldBytes == 0 || heldBytes &+ Int(placed.header.length) <= Self.maximumHeldBytes,
            let request = take(placed.header, .write)
        else { return false }
        placement = nil
        heldBytes &+= Int(placed.header.length)
        request.pointee.payload = placed.base
        request.pointee.input = placed.own
        placed.own?.pointee.references = 1
        target.submit(request)
        return true
    }

    /// Answers a request that must not reach the volume; a write's payload is thrown away first.
    private func refuse(
        _ header: RequestHeader, _ command: Command?, _ refusal: Refusal, _ input: UnsafeMutablePointer<Input>
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
    private func dropPayload(_ input: UnsafeMutablePointer<Input>) -> Bool {
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
