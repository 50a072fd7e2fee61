import EventLoop

/// A buffer a session receives into: headers and payloads as they came, payloads used where they are. It is kept
/// while a write whose payload it holds is in flight.
struct Input {
    /// Bytes of a usual buffer: a queue of 32 small writes fits, and the second-level cache holds it.
    static let usualCapacity = 256 << 10

    let buffer: Buffer
    let base: UnsafeMutableRawPointer
    let capacity: Int
    /// First byte not yet parsed.
    var start = 0
    /// First byte not yet received.
    var end = 0
    /// Writes in flight whose payload is here.
    var references = 0

    /// This struct sits at the front of its own buffer, so that none is allocated beside it.
    private static let headSize = 128

    var available: Int { end &- start }
    var room: Int { capacity &- end }

    /// - Returns: an empty input of at least `count` bytes; nil when the pool is exhausted.
    static func allocate(_ count: Int, from buffers: BufferPool) -> UnsafeMutablePointer<Input>? {
        assert(MemoryLayout<Input>.size <= headSize)
        guard let buffer = buffers.allocate(max(count &+ headSize, usualCapacity)) else { return nil }
        let input = buffer.base.bindMemory(to: Input.self, capacity: 1)
        input.initialize(
            to: Input(buffer: buffer, base: buffer.base + headSize, capacity: buffer.capacity &- headSize))
        return input
    }
}

/// A large write on its way in, its payload apart from all others.
struct Placement {
    let header: RequestHeader
    /// Where the backend keeps it, or in `own`.
    let base: UnsafeMutableRawPointer
    /// Bytes of the payload that are there.
    var received: Int
    let own: UnsafeMutablePointer<Input>?

    var left: Int { Int(header.length) &- received }
}
