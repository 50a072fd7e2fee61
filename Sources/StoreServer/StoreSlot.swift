import Backend
import EventLoop
import PureFlash

/// One command of one connection, from its last byte to its reply. Lives in a slab of the volume.
struct StoreSlot {
    /// The reply as it is sent. First in the struct.
    var reply: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
    /// Bytes of `reply` to send: all, unless a fault switch wants less.
    var replyCount = StoreReply.size
    /// Read data behind the reply.
    var dataCount = 0
    var io: IO
    /// The connection that brought it, and nothing but that connection, gets the reply.
    var session: Unmanaged<StoreSession>
    var next: UnsafeMutablePointer<StoreSlot>?
    /// Where a write's payload is.
    var input: UnsafeMutablePointer<StoreInput>?
    /// Payload and data that count against the connection, bytes.
    var held: Int
    var command: StoreCommand
    /// The connection ends when the reply is out.
    var isLast = false
    /// Pieces at the backend, of a command it cannot do at once; 0 of any other.
    var parts: UInt8 = 0
    /// Held back until then by a fault switch: nanoseconds of CLOCK_MONOTONIC.
    var due: UInt64 = 0

    init(_ command: StoreCommand, session: StoreSession, slot: UnsafeMutableRawPointer) {
        self.command = command
        self.session = .passUnretained(session)
        held = Int(command.length)
        io = IO(
            operation: command.opcode == StoreCommand.Opcode.write.rawValue ? .write : .read, offset: command.offset,
            length: command.length, request: slot)
    }
}

/// A buffer a connection receives into: commands and payloads as they came, payloads used where they are. It is kept
/// while a write whose payload it holds is in flight.
struct StoreInput {
    /// Bytes of a usual buffer: a queue of 32 small writes fits, and the second-level cache holds it.
    static let usualCapacity = 256 << 10
    /// This struct sits at the front of its own buffer, so that none is allocated beside it.
    private static let headSize = 128

    let buffer: Buffer
    let base: UnsafeMutableRawPointer
    let capacity: Int
    /// First byte not yet parsed.
    var start = 0
    /// First byte not yet received.
    var end = 0
    /// Writes in flight whose payload is here.
    var references = 0

    var available: Int { end &- start }
    var room: Int { capacity &- end }

    /// - Returns: an empty input of at least `count` bytes; nil when the pool is exhausted.
    static func allocate(_ count: Int, from buffers: BufferPool) -> UnsafeMutablePointer<StoreInput>? {
        assert(MemoryLayout<StoreInput>.size <= headSize)
        guard let buffer = buffers.allocate(count &+ headSize) else { return nil }
        let input = buffer.base.bindMemory(to: StoreInput.self, capacity: 1)
        input.initialize(
            to: StoreInput(buffer: buffer, base: buffer.base + headSize, capacity: buffer.capacity &- headSize))
        return input
    }
}

/// A large write on its way in, its payload apart from all others.
struct StorePlacement {
    let command: StoreCommand
    /// Where the backend keeps it, or in `own`.
    let base: UnsafeMutableRawPointer
    /// Bytes of the payload that are there.
    var received: Int
    let own: UnsafeMutablePointer<StoreInput>?

    var left: Int { Int(command.length) &- received }
}
