import CLinux
import Glibc

/// Lays the unsent bytes of a queue of messages out for one `sendmsg`. On the loop's thread.
package struct Gathering {
    private let vectors: UnsafeMutablePointer<iovec>
    private let capacity: Int
    private var skip: Int
    private var count = 0
    /// Bytes laid out.
    package private(set) var bytes = 0

    /// - Parameters:
    ///   - vectors: scratch, at most 1024 of them (IOV_MAX).
    ///   - sent: bytes at the front of what is added that are sent already.
    @inline(__always)
    package init(_ vectors: UnsafeMutablePointer<iovec>, capacity: Int, sent: Int) {
        self.vectors = vectors
        self.capacity = capacity
        skip = sent
    }

    /// Pieces that can still be added.
    @inline(__always)
    package var room: Int { capacity &- count }

    /// There must be room for it.
    @inline(__always)
    package mutating func add(_ base: UnsafeMutableRawPointer, _ length: Int) {
        if skip >= length {
            skip &-= length
            return
        }
        vectors[count] = iovec(iov_base: base + skip, iov_len: length &- skip)
        bytes &+= length &- skip
        skip = 0
        count &+= 1
    }

    /// Sends what the socket takes now.
    /// - Returns: as sendmsg(2), with `errno`.
    @inline(__always)
    package func send(to descriptor: Int32) -> Int {
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = count
        return sendmsg(descriptor, &message, Int32(MSG_NOSIGNAL | MSG_DONTWAIT))
    }
}
