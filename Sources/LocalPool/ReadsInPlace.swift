import Backend
import CLinux
import EventLoop

/// Leaves the data of large reads in their file, where that is in memory: to send it from there saves two copies, and
/// costs some system calls. On the volume's loop.
struct ReadsInPlace {
    /// Bytes from which on it pays.
    private static let minimum: UInt32 = 32 << 10
    private var isPossible: Bool

    init(for client: any BackendClient) { isPossible = client.sendsFromFiles }

    /// - Returns: false where the data has to be read.
    @inline(__always)
    mutating func leave(_ io: UnsafeMutablePointer<IO>, in file: Int32) -> Bool {
        guard isPossible, io.pointee.length >= Self.minimum else { return false }
        let answer = qbd_is_in_memory(file, io.pointee.offset, UInt64(io.pointee.length))
        if answer < 0 { isPossible = false }
        guard answer > 0 else { return false }
        io.pointee.segment.file = file
        io.pointee.segment.position = io.pointee.offset
        io.pointee.segment.count = Int(io.pointee.length)
        return true
    }
}
