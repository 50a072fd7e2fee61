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
    var input: UnsafeMutablePointer<InputBuffer>?
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
