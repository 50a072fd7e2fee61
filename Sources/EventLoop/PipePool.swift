import CLinux
import Glibc
import Synchronization

/// A pipe with pages of a file in it, on their way to a socket. The pages are the file's own: what is written to the file
/// before they are sent may be sent instead, as it may for any read that is still under way.
package struct Pipe {
    package let reader: Int32
    let writer: Int32

    /// Puts a part of a file in, at once and all of it. Waits for a disk where that is not in memory.
    /// - Parameter length: bytes, at most `PipePool.capacity`.
    /// - Returns: false when not all of it could be had; the pipe may have some of it then.
    package func fill(from file: Int32, offset: UInt64, length: Int) -> Bool {
        var position = off_t(offset)
        var count = splice(file, &position, writer, nil, length, UInt32(SPLICE_F_NONBLOCK))
        while count < 0, errno == EINTR {
            count = splice(file, &position, writer, nil, length, UInt32(SPLICE_F_NONBLOCK))
        }
        return count == length
    }
}

/// Pipes for the large reads of one loop, made as they are needed. On the loop's thread.
package final class PipePool {
    /// Bytes a pipe holds.
    package static let capacity = 1 << 20
    /// Pipes at a time: each takes two descriptors, and room for its pages' addresses.
    private static let maximum = 32
    /// Of all loops.
    private static let total = Atomic<Int>(0)
    /// A quarter of the process's descriptors.
    private let maximumOfAll: Int

    private var free: [Pipe] = []
    private var made = 0
    /// The system has no more, as far as is known.
    private var isExhausted = false

    /// nil where the process does not ignore SIGPIPE: splice(2) to a socket has no flag against it.
    package init?() {
        var action = sigaction()
        var limit = rlimit()
        guard sigaction(SIGPIPE, nil, &action) == 0, qbd_is_ignored(&action) != 0,
            getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0
        else { return nil }
        maximumOfAll = Int(min(limit.rlim_cur, 1 << 30)) / 8
    }

    deinit { trim() }

    /// - Returns: an empty pipe; nil when there are too many, or the system has none.
    package func take() -> Pipe? {
        if let pipe = free.popLast() { return pipe }
        guard made < Self.maximum, !isExhausted, Self.total.load(ordering: .relaxed) < maximumOfAll else { return nil }
        guard let pipe = make() else {
            isExhausted = true
            return nil
        }
        made += 1
        Self.total.add(1, ordering: .relaxed)
        return pipe
    }

    private func make() -> Pipe? {
        var ends: [Int32] = [-1, -1]
        guard pipe2(&ends, O_CLOEXEC | O_NONBLOCK) == 0 else { return nil }
        let pipe = Pipe(reader: ends[0], writer: ends[1])
        if qbd_set_pipe_size(pipe.writer, Int32(Self.capacity)) >= Self.capacity { return pipe }
        Self.close(pipe)
        return nil
    }

    /// - Parameter isEmpty: everything that was put in was taken out.
    package func give(_ pipe: Pipe, isEmpty: Bool) {
        if isEmpty { return free.append(pipe) }
        remove(pipe)
    }

    /// Gives back those that are not in use.
    package func trim() {
        isExhausted = false
        for pipe in free { remove(pipe) }
        free = []
    }

    private func remove(_ pipe: Pipe) {
        Self.close(pipe)
        made -= 1
        Self.total.subtract(1, ordering: .relaxed)
    }

    private static func close(_ pipe: Pipe) {
        Glibc.close(pipe.reader)
        Glibc.close(pipe.writer)
    }
}
