import CLinux
import Glibc

/// A buffer a connection receives into: headers and payloads as they came, payloads used where they are. It is kept
/// while a request whose payload it holds is in flight.
package struct InputBuffer {
    /// Bytes of a usual buffer: a queue of 32 small writes fits, and the second-level cache holds it.
    static let usualCapacity = 256 << 10
    /// This struct sits at the front of its own buffer, so that none is allocated beside it.
    private static let headSize = 128

    let buffer: Buffer
    package let base: UnsafeMutableRawPointer
    let capacity: Int
    /// First byte not yet parsed.
    package var start = 0
    /// First byte not yet received.
    package var end = 0
    /// Requests in flight whose payload is here.
    package var references = 0

    package var available: Int { end &- start }
    /// The first byte not yet parsed.
    package var front: UnsafeMutableRawPointer { base + start }
    var room: Int { capacity &- end }

    /// - Returns: an empty one of at least `count` bytes; nil when the pool is exhausted.
    static func allocate(_ count: Int, from buffers: BufferPool) -> UnsafeMutablePointer<InputBuffer>? {
        assert(MemoryLayout<InputBuffer>.size <= headSize)
        guard let buffer = buffers.allocate(max(count &+ headSize, usualCapacity)) else { return nil }
        let input = buffer.base.bindMemory(to: InputBuffer.self, capacity: 1)
        input.initialize(
            to: InputBuffer(buffer: buffer, base: buffer.base + headSize, capacity: buffer.capacity &- headSize))
        return input
    }
}

/// A large payload on its way in, apart from all others.
package struct PlacedPayload {
    /// Where the backend keeps it, or in `own`.
    package let base: UnsafeMutableRawPointer
    let length: Int
    /// Bytes of the payload that are there.
    var received: Int
    package let own: UnsafeMutablePointer<InputBuffer>?

    package var left: Int { length &- received }
}

/// What has arrived on a stream socket of requests: each a header of one size, maybe with a payload behind it. On the
/// loop's thread.
package struct StreamInput {
    /// From this payload on, the rest of one is received alone, at its place or in one piece, so that it is never moved.
    package static let largePayload = 32 << 10

    private let descriptor: Int32
    private let headerSize: Int
    private let buffers: BufferPool

    /// Where requests are parsed; nil until something arrived, and when the memory of an idle connection was given back.
    package private(set) var current: UnsafeMutablePointer<InputBuffer>?
    /// Bytes that must arrive before the request at the front is whole; 0 when its header is not there yet.
    package var missing = 0
    /// The payload that is received at its place.
    package private(set) var placed: PlacedPayload?
    /// The request before was a large one: of what comes next, the header alone is received, so that none of a payload
    /// behind it has to be moved to its place.
    package private(set) var followsLarge = false

    /// - Parameters:
    ///   - descriptor: a connected stream socket; stays the owner's.
    ///   - headerSize: bytes of a request's header.
    package init(descriptor: Int32, headerSize: Int, buffers: BufferPool) {
        self.descriptor = descriptor
        self.headerSize = headerSize
        self.buffers = buffers
    }

    /// Part of a request has arrived.
    package var isWithinRequest: Bool { placed != nil || current.map { $0.pointee.available > 0 } ?? false }

    /// The request at the front is a large one whose rest is to be received at a place of its own, which `place` makes.
    package var wantsPlace: Bool { placed == nil && missing > Self.largePayload }

    // MARK: Receiving

    /// Receives once what is there, without waiting.
    /// - Parameter flags: 0 waits, where the socket blocks.
    /// - Returns: as recv(2), with `errno`.
    package mutating func receive(flags: Int32 = Int32(MSG_DONTWAIT)) -> Int {
        guard let input = roomToReceive() else {
            errno = ENOMEM
            return -1
        }
        if let placed, placed.left > 0 { return receive(placed, input, flags) }
        let room = followsLarge ? headerSize &- input.pointee.available : input.pointee.room
        let count = recv(descriptor, input.pointee.base + input.pointee.end, room, flags)
        if count > 0 {
            input.pointee.end &+= count
            followsLarge = false
        }
        return count
    }

    /// The rest of a payload at its place, and the next header behind it in the input.
    private mutating func receive(
        _ payload: PlacedPayload, _ input: UnsafeMutablePointer<InputBuffer>, _ flags: Int32
    ) -> Int {
        let left = payload.left
        let count = withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2) { vectors in
            vectors.initializeElement(at: 0, to: iovec(iov_base: payload.base + payload.received, iov_len: left))
            vectors.initializeElement(
                at: 1,
                to: iovec(
                    iov_base: input.pointee.base + input.pointee.end, iov_len: min(input.pointee.room, headerSize)))
            var message = msghdr()
            message.msg_iov = vectors.baseAddress
            message.msg_iovlen = 2
            return recvmsg(descriptor, &message, flags)
        }
        if count > 0 {
            placed?.received += min(count, left)
            input.pointee.end &+= max(count - left, 0)
        }
        return count
    }

    /// Takes bytes in that were received elsewhere, before any others. Returns false when there is no memory.
    package mutating func begin(with bytes: [UInt8]) -> Bool {
        guard let input = need(bytes.count) else { return false }
        bytes.withUnsafeBytes { bytes in
            guard let source = bytes.baseAddress else { return }
            input.pointee.base.copyMemory(from: source, byteCount: bytes.count)
        }
        input.pointee.end = bytes.count
        return true
    }

    /// Makes sure that `count` bytes from the first unparsed one fit in one piece. Returns false when there is no memory.
    package mutating func makeRoom(_ count: Int) -> Bool {
        guard let input = current else { return false }
        if input.pointee.capacity &- input.pointee.start >= count { return true }
        if input.pointee.references == 0, input.pointee.capacity >= count {
            let rest = input.pointee.available
            memmove(input.pointee.base, input.pointee.front, rest)
            input.pointee.start = 0
            input.pointee.end = rest
            return true
        }
        return replace(count) != nil
    }

    private mutating func roomToReceive() -> UnsafeMutablePointer<InputBuffer>? {
        guard let input = current else { return need(0) }
        if input.pointee.available == 0 {
            if input.pointee.references == 0 {
                input.pointee.start = 0
                input.pointee.end = 0
                return input
            }
            if input.pointee.room < input.pointee.capacity / 4 { return replace(0) }
        }
        return input.pointee.room > 0 ? input : replace(0)
    }

    /// The current buffer, or a first one of at least `count` bytes.
    private mutating func need(_ count: Int) -> UnsafeMutablePointer<InputBuffer>? {
        if let current { return current }
        current = InputBuffer.allocate(count, from: buffers)
        return current
    }

    /// A new current buffer of at least `count` bytes that begins with what is unparsed in the old one.
    private mutating func replace(_ count: Int) -> UnsafeMutablePointer<InputBuffer>? {
        let old = current
        current = nil
        guard let new = need(count) else {
            current = old
            return nil
        }
        guard let old else { return new }
        let rest = old.pointee.available
        new.pointee.base.copyMemory(from: old.pointee.front, byteCount: rest)
        new.pointee.end = rest
        old.pointee.start = old.pointee.end
        if old.pointee.references == 0 { buffers.free(old.pointee.buffer) }
        return new
    }

    // MARK: Large payloads

    /// Moves what has arrived of the request at the front to its place, where the rest will follow: aligned, it is
    /// copied on at full speed.
    /// - Parameter base: where the backend keeps it; nil for a piece of memory of its own.
    /// - Returns: false when there is no memory.
    package mutating func place(_ length: Int, at base: UnsafeMutableRawPointer?) -> Bool {
        guard let input = current else { return false }
        let own = base == nil ? InputBuffer.allocate(length, from: buffers) : nil
        guard let base = base ?? own?.pointee.base else { return false }
        let received = input.pointee.available &- headerSize
        base.copyMemory(from: input.pointee.front + headerSize, byteCount: received)
        input.pointee.start = input.pointee.end
        missing = 0
        placed = PlacedPayload(base: base, length: length, received: received, own: own)
        return true
    }

    /// Receives the rest of a placed payload into a piece of memory of its own, what has arrived of it with it: nothing
    /// more lands at its place from here on. What did land stays there, as of any write that was cut off.
    /// - Returns: false when there is no memory.
    package mutating func withdrawPlacement() -> Bool {
        guard let payload = placed, payload.own == nil else { return true }
        guard let own = InputBuffer.allocate(payload.length, from: buffers) else { return false }
        own.pointee.base.copyMemory(from: payload.base, byteCount: payload.received)
        placed = PlacedPayload(base: own.pointee.base, length: payload.length, received: payload.received, own: own)
        return true
    }

    /// The request of the placed payload has begun, and holds the memory that is its own.
    package mutating func takePlaced() -> UnsafeMutablePointer<InputBuffer>? {
        let own = placed?.own
        own?.pointee.references = 1
        placed = nil
        followsLarge = current.map { $0.pointee.available < headerSize } ?? true
        return own
    }

    // MARK: Giving back

    /// A request whose payload was there is done with it.
    @inline(__always)
    package func release(_ input: UnsafeMutablePointer<InputBuffer>) {
        input.pointee.references &-= 1
        if input.pointee.references == 0, input != current { buffers.free(input.pointee.buffer) }
    }

    /// Gives the memory of an idle connection back.
    package mutating func releaseIdleMemory() {
        // A request that waits at its place is begun by parsing, which goes by the input.
        guard placed == nil, let current, current.pointee.available == 0, current.pointee.references == 0 else {
            return
        }
        buffers.free(current.pointee.buffer)
        self.current = nil
    }

    /// Gives everything back; nothing of it is in flight.
    package mutating func free() {
        if let current { buffers.free(current.pointee.buffer) }
        current = nil
        if let own = placed?.own { buffers.free(own.pointee.buffer) }
        placed = nil
    }
}
