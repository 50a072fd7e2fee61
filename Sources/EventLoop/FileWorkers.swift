import CLinux
import Glibc
import Synchronization

/// A stretch of a volume that is allocated in one way.
package struct Extent {
    /// Bytes.
    package var length: UInt32
    /// 0 for data; `holeAndZero` where nothing is stored and zeros are read. The bits are NBD's `base:allocation`.
    package var flags: UInt32

    package static let holeAndZero: UInt32 = 3

    package init(length: UInt32, flags: UInt32) {
        self.length = length
        self.flags = flags
    }
}

/// A few threads that do blocking file operations for one loop: one from the beginning, so that there is one, and the
/// others with the first work. A turn's operations are handed over together, and come back together.
final class FileWorkers: EventSource {
    private let loop: EventLoop
    private let count: Int
    private let shared: Shared
    private var threads: [Thread]
    private var areAllStarted: Bool
    private var token: EventLoop.Token?
    private var collected = OperationList()
    unowned(unsafe) var owner: FileRing?

    private final class Shared: @unchecked Sendable {
        struct Queues: @unchecked Sendable {
            var waiting = OperationList()
            var finished = OperationList()
            var stopped = false
        }
        let queues = Mutex(Queues())
        /// Counts hand-overs; a worker sleeps in its read.
        let work: Descriptor
        /// Tells the loop that finished operations wait.
        let done: Descriptor

        init() throws(SystemError) {
            work = Descriptor(try retrying("eventfd") { eventfd(0, Int32(EFD_CLOEXEC)) })
            done = Descriptor(try retrying("eventfd") { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) })
        }
    }

    init(loop: EventLoop, count: Int) throws(SystemError) {
        self.loop = loop
        self.count = count
        shared = try Shared()
        areAllStarted = count == 1
        threads = [try Self.startThread(0, of: count, shared)]
        do { token = try loop.add(shared.done.number, events: EPOLLIN.rawValue, source: self) } catch {
            close()
            throw error
        }
    }

    @inline(__always)
    func add(_ operation: UnsafeMutablePointer<FileOperation>) { collected.append(operation) }

    /// Gives what was added since the last call to the threads.
    @inline(__always)
    func handOver() {
        if collected.head != nil { handOverCollected() }
    }

    private func handOverCollected() {
        if !areAllStarted { startOthers() }
        let list = collected.removeAll()
        guard let head = list.head, let tail = list.tail else { return }
        let wasEmpty = shared.queues.withLock { queues in
            let wasEmpty = queues.waiting.head == nil
            queues.waiting.append(chainFrom: head, to: tail)
            return wasEmpty
        }
        if wasEmpty { signalEvent(shared.work.number) }
    }

    private static func startThread(_ index: Int, of count: Int, _ shared: Shared) throws(SystemError) -> Thread {
        try Thread(name: "qbd:file\(index)") { run(shared, alone: count == 1) }
    }

    private func startOthers() {
        areAllStarted = true
        do throws(SystemError) {
            for index in 1..<count { threads.append(try Self.startThread(index, of: count, shared)) }
        } catch {
            // Those that are there do the work, if more slowly.
        }
    }

    /// Takes over an operation that was done on a thread which is the loop's no more. From any thread.
    func deliver(_ operation: UnsafeMutablePointer<FileOperation>, result: Int32) {
        operation.pointee.result = result
        var done = OperationList()
        done.append(operation)
        Self.finished(done, shared)
    }

    func close() {
        shared.queues.withLock { $0.stopped = true }
        signalEvent(shared.work.number)
        for thread in threads { thread.join() }
        threads = []
        if let token { loop.remove(token, descriptor: shared.done.number) }
        token = nil
    }

    func ready(events: UInt32) {
        var value: UInt64 = 0
        _ = Glibc.read(shared.done.number, &value, 8)
        var list = shared.queues.withLock { $0.finished.removeAll() }
        while let operation = list.removeFirst() {
            owner?.finish(operation, result: operation.pointee.result)
        }
    }

    // MARK: On a worker's thread

    /// Operations and bytes a thread takes at a time: others share a deep queue, and the loop answers the first while
    /// the next are done.
    private static let grab = 8
    private static let grabbedBytes = 64 << 10

    private static func run(_ shared: Shared, alone: Bool) {
        while true {
            var more = false
            var (mine, stopped) = shared.queues.withLock { queues -> (OperationList, Bool) in
                var mine = OperationList()
                var bytes = 0
                for _ in 0..<grab where bytes < grabbedBytes {
                    guard let operation = queues.waiting.removeFirst() else { break }
                    bytes &+= operation.pointee.length
                    mine.append(operation)
                }
                more = !alone && queues.waiting.head != nil
                return (mine, queues.stopped)
            }
            guard mine.head != nil else {
                if stopped {
                    // The next one sleeps on the same count.
                    signalEvent(shared.work.number)
                    return
                }
                var value: UInt64 = 0
                _ = Glibc.read(shared.work.number, &value, 8)
                continue
            }
            if more { signalEvent(shared.work.number) }
            var finished = OperationList()
            while let operation = mine.removeFirst() {
                operation.pointee.result = perform(operation)
                finished.append(operation)
            }
            Self.finished(finished, shared)
        }
    }

    private static func finished(_ list: OperationList, _ shared: Shared) {
        guard let head = list.head, let tail = list.tail else { return }
        let first = shared.queues.withLock { queues in
            let first = queues.finished.head == nil
            queues.finished.append(chainFrom: head, to: tail)
            return first
        }
        if first { signalEvent(shared.done.number) }
    }

    /// - Returns: as io_uring does: bytes or 0, or a negative errno.
    static func perform(_ operation: UnsafeMutablePointer<FileOperation>) -> Int32 {
        let op = operation.pointee
        while true {
            let result: Int
            switch op.kind {
            case .read: result = pread(op.descriptor, op.base, op.length, off_t(op.offset))
            case .write: result = pwrite(op.descriptor, op.base, op.length, off_t(op.offset))
            case .synchronize: result = Int(fdatasync(op.descriptor))
            case .allocate: result = Int(fallocate(op.descriptor, op.flags, off_t(op.offset), off_t(op.length)))
            case .query:
                guard let extents = op.base?.assumingMemoryBound(to: Extent.self) else { return -EINVAL }
                result = query(op, extents)
            }
            if result >= 0 { return Int32(result) }
            if errno != EINTR { return -errno }
        }
    }

    /// Alternating extents from `op.offset` on, with lseek(2) SEEK_DATA and SEEK_HOLE; stops early when the array at
    /// `op.base` is full.
    /// - Returns: how many, or -1 with errno set.
    private static func query(_ op: FileOperation, _ extents: UnsafeMutablePointer<Extent>) -> Int {
        var position = off_t(op.offset)
        let end = position + off_t(op.length)
        var count = 0
        while position < end, count < Int(op.flags) {
            var data = lseek(op.descriptor, position, SEEK_DATA)
            if data < 0 {
                guard errno == ENXIO else { return -1 }
                data = end
            }
            var next = min(data, end)
            var flags = Extent.holeAndZero
            if data <= position {
                let hole = lseek(op.descriptor, position, SEEK_HOLE)
                guard hole >= 0 else { return -1 }
                // No progress means that the file shrank under us: the rest reads as nothing.
                guard hole > position else { break }
                next = min(hole, end)
                flags = 0
            }
            extents[count] = Extent(length: UInt32(next - position), flags: flags)
            count += 1
            position = next
        }
        return count
    }
}

/// Operations in their order, linked through themselves.
struct OperationList {
    private(set) var head: UnsafeMutablePointer<FileOperation>?
    private(set) var tail: UnsafeMutablePointer<FileOperation>?

    mutating func append(_ operation: UnsafeMutablePointer<FileOperation>) {
        operation.pointee.next = nil
        append(chainFrom: operation, to: operation)
    }

    mutating func append(
        chainFrom first: UnsafeMutablePointer<FileOperation>, to last: UnsafeMutablePointer<FileOperation>
    ) {
        if let tail { tail.pointee.next = first } else { head = first }
        tail = last
    }

    mutating func removeAll() -> OperationList {
        defer { self = OperationList() }
        return self
    }

    mutating func removeFirst() -> UnsafeMutablePointer<FileOperation>? {
        guard let first = head else { return nil }
        head = first.pointee.next
        if head == nil { tail = nil }
        return first
    }
}
