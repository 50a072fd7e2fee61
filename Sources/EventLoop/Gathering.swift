import CLinux
import Glibc

/// Lays the unsent bytes of a queue of messages out for one `sendmsg`. On the loop's thread.
package struct Gathering {
    private let vectors: UnsafeMutablePointer<iovec>
    private let capacity: Int
    private var skip: Int
    private var count = 0
    /// What comes behind the bytes laid out, in a pipe; nothing can be added behind that.
    private var pipe: (reader: Int32, length: Int)?
    /// Bytes laid out, without those in a pipe.
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
    package var room: Int { pipe == nil ? capacity &- count : 0 }

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
        guard segment.pipe >= 0 else { return add(segment.base, segment.count) }
        if skip >= segment.count {
            skip &-= segment.count
            return
        }
        // What is sent of it has left the pipe.
        pipe = (segment.pipe, segment.count &- skip)
        skip = 0
    }

    /// What is to be sent comes from a pipe: the socket must not block.
    @inline(__always)
    package var wantsNoBlocking: Bool { pipe != nil }

    /// Sends what the socket takes now: what is laid out, or what is in the pipe when that comes first. A socket that gets
    /// data from pipes has O_NONBLOCK set.
    /// - Returns: as sendmsg(2), with `errno`; 0 when what was in the pipe is not to be had any more.
    @inline(__always)
    package func send(to descriptor: Int32) -> Int {
        if count == 0, let pipe {
            return splice(pipe.reader, nil, descriptor, nil, pipe.length, UInt32(SPLICE_F_NONBLOCK))
        }
        let flags = Int32(MSG_NOSIGNAL | MSG_DONTWAIT | (pipe == nil ? 0 : MSG_MORE))
        if count == 1 { return Glibc.send(descriptor, vectors[0].iov_base, vectors[0].iov_len, flags) }
        var message = msghdr()
        message.msg_iov = vectors
        message.msg_iovlen = count
        return sendmsg(descriptor, &message, flags)
    }
}
