import CLinux
import Glibc

/// Lays the unsent bytes of a queue of messages out for one `sendmsg`. On the loop's thread.
package struct Gathering {
    private let vectors: UnsafeMutablePointer<iovec>
    private let capacity: Int
    private var skip: Int
    private var count = 0
    /// What comes behind the bytes laid out, in a file; nothing can be added behind that.
    private var file: (descriptor: Int32, position: UInt64, length: Int)?
    /// Bytes laid out, without those in a file.
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
    package var room: Int { file == nil ? capacity &- count : 0 }

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

    @inline(__always)
    package mutating func add(_ segment: Segment) {
        guard segment.file >= 0 else { return add(segment.base, segment.count) }
        if skip >= segment.count {
            skip &-= segment.count
            return
        }
        file = (segment.file, segment.position &+ UInt64(skip), segment.count &- skip)
        skip = 0
    }

    /// Sends what the socket takes now: what is laid out, or what is in the file when that comes first.
    /// - Returns: as sendmsg(2), with `errno`.
    @inline(__always)
    package func send(to descriptor: Int32) -> Int {
        if count == 0, let file {
            // As it lies in the page cache, without a copy.
            var position = off_t(file.position)
            return sendfile(descriptor, file.descriptor, &position, file.length)
        }
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = count
        let more = file == nil ? 0 : MSG_MORE
        return sendmsg(descriptor, &message, Int32(MSG_NOSIGNAL | MSG_DONTWAIT | more))
    }
}
