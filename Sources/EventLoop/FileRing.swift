import CLinux
import Glibc

/// Receives the results of file operations, on the loop's thread.
package protocol FileCompletion: AnyObject {
    /// - Parameters:
    ///   - context: as given at submission.
    ///   - result: 0 (a query: the number of extents), or a negative errno. Reads and writes are complete when it is
    ///     0; a read behind the end of the file is -EIO.
    func fileOperationCompleted(_ context: UnsafeMutableRawPointer, result: Int32)
}

/// One file operation, from submission to completion.
struct FileOperation {
    enum Kind: UInt8 { case read, write, synchronize, allocate, query }

    var kind: Kind
    var descriptor: Int32
    /// FALLOC_FL mode of an allocation; most extents of a query.
    var flags: Int32
    var base: UnsafeMutableRawPointer?
    var length: Int
    var offset: UInt64
    var context: UnsafeMutableRawPointer
    var result: Int32 = 0
    var next: UnsafeMutablePointer<FileOperation>?
}

/// Asynchronous file I/O for one loop: collected during a turn, submitted together at its end. On io_uring for all
/// that it does without a thread of its own. Buffered writes are done by the loop's thread, which another one relieves when
/// that takes long; a few threads do them while that happens, and everything where io_uring is refused.
package final class FileRing: EventSource, TurnObserver {
    private let loop: EventLoop
    private var operations: Slab<FileOperation>
    private let ring: UnsafeMutablePointer<io_uring>?
    private var ringToken: EventLoop.Token?
    private let workers: FileWorkers
    /// Writes of this turn that the loop's thread does itself.
    private var own = OperationList()
    private var unsubmitted = 0
    /// Entries that the ring has, submitted or not, and operations that wait until it has fewer.
    private var onRing = 0
    private var behindRing = OperationList()
    /// Of the loop's `now`: until then the ring gets nothing, since the kernel would not take it.
    private var ringResumes: UInt64 = 0
    /// A read, while it is all that this turn has for the ring. What is in the page cache is read with one plain system
    /// call then, of which the ring has nothing to tell.
    private var lone: UnsafeMutablePointer<FileOperation>?
    /// Reads for which that is not tried, since one was not in the page cache.
    private var untried = 0
    private unowned(unsafe) let completion: any FileCompletion

    /// Operations submitted and not completed, at most the capacity.
    package var inFlight: Int { operations.inUse }
    /// Whether the kernel gave us an io_uring.
    package var usesRing: Bool { ring != nil }

    /// Bytes the loop's thread writes in one turn, and in one call: more takes so long that others had better go on.
    private static let ownBytes = 1 << 20
    /// Reads for the ring after one that the page cache did not have.
    private static let untriedAfterMiss = 32
    /// Nanoseconds in which the ring is not used after the kernel took nothing.
    private static let ringPause: UInt64 = 20_000_000

    /// On the loop's thread.
    /// - Parameters:
    ///   - capacity: most operations at a time.
    ///   - useRing: false does without io_uring.
    ///   - completion: outlives this object.
    package init(loop: EventLoop, capacity: Int, useRing: Bool = true, completion: any FileCompletion)
        throws(SystemError)
    {
        self.loop = loop
        self.completion = completion
        operations = try Slab(of: capacity)
        try loop.prepareToBlock()
        let ring = useRing ? Self.makeRing() : nil
        self.ring = ring
        do throws(SystemError) { workers = try FileWorkers(loop: loop, count: ring == nil ? 4 : 1) } catch {
            if let ring { Self.exit(ring) }
            throw error
        }
        workers.owner = self
        if let ring {
            do throws(SystemError) {
                ringToken = try loop.add(ring.pointee.ring_fd, events: EPOLLIN.rawValue, source: self)
            } catch {
                workers.close()
                Self.exit(ring)
                throw error
            }
        }
        loop.observe(self)
    }

    /// Takes the ring out of the loop. Nothing may be in flight.
    package func close() {
        precondition(operations.inUse == 0, "file operations in flight at close")
        loop.unobserve(self)
        workers.close()
        guard let ring, let token = ringToken else { return }
        loop.remove(token, descriptor: ring.pointee.ring_fd)
        ringToken = nil
        Self.exit(ring)
    }

    private static func exit(_ ring: UnsafeMutablePointer<io_uring>) {
        io_uring_queue_exit(ring)
        ring.deallocate()
    }

    /// Completions are collected by system calls we make anyway (COOP_TASKRUN, Linux 5.19); older kernels refuse the
    /// flag, sandboxes refuse io_uring.
    private static func makeRing() -> UnsafeMutablePointer<io_uring>? {
        let ring = UnsafeMutablePointer<io_uring>.allocate(capacity: 1)
        for flags in [UInt32(IORING_SETUP_COOP_TASKRUN), 0] {
            ring.initialize(to: io_uring())
            if io_uring_queue_init(128, ring, flags) == 0 { return ring }
        }
        ring.deallocate()
        return nil
    }

    // MARK: Submission

    /// Reads all of `length` bytes. Returns false, having done nothing, when the capacity is used up; so do the others.
    package func read(
        _ descriptor: Int32, into base: UnsafeMutableRawPointer, length: Int, offset: UInt64,
        context: UnsafeMutableRawPointer
    ) -> Bool {
        start(.read, descriptor, flags: 0, base, length, offset, context)
    }

    /// Writes all of `length` bytes.
    package func write(
        _ descriptor: Int32, from base: UnsafeMutableRawPointer, length: Int, offset: UInt64,
        context: UnsafeMutableRawPointer
    ) -> Bool {
        start(.write, descriptor, flags: 0, base, length, offset, context)
    }

    /// fdatasync(2). The kernel reports a lost write once to each open file, to whichever of its synchronisations comes
    /// first: have one at a time under way.
    /// - Parameter range: what has to be on stable storage, bytes; the rest may be, too. Nil for all of the file.
    package func synchronize(_ descriptor: Int32, range: Range<UInt64>? = nil, context: UnsafeMutableRawPointer) -> Bool
    {
        guard let range, range.upperBound - range.lowerBound <= UInt64(Int32.max) else {
            return start(.synchronize, descriptor, flags: 0, nil, 0, 0, context)
        }
        let length = Int(range.upperBound - range.lowerBound)
        return start(.synchronize, descriptor, flags: 0, nil, length, range.lowerBound, context)
    }

    /// fallocate(2).
    /// - Parameter mode: FALLOC_FL flags.
    package func allocate(
        _ descriptor: Int32, mode: Int32, offset: UInt64, length: Int, context: UnsafeMutableRawPointer
    ) -> Bool {
        start(.allocate, descriptor, flags: mode, nil, length, offset, context)
    }

    /// The extents of `length` bytes at `offset`, written to `extents`; completes with their number, at least 1.
    package func queryExtents(
        _ descriptor: Int32, offset: UInt64, length: Int, extents: UnsafeMutablePointer<Extent>, capacity: Int,
        context: UnsafeMutableRawPointer
    ) -> Bool {
        start(.query, descriptor, flags: Int32(capacity), UnsafeMutableRawPointer(extents), length, offset, context)
    }

    @inline(__always)
    private func start(
        _ kind: FileOperation.Kind, _ descriptor: Int32, flags: Int32, _ base: UnsafeMutableRawPointer?,
        _ length: Int, _ offset: UInt64, _ context: UnsafeMutableRawPointer
    ) -> Bool {
        guard let operation = operations.take() else { return false }
        operation.initialize(
            to: FileOperation(
                kind: kind, descriptor: descriptor, flags: flags, base: base, length: length, offset: offset,
                context: context))
        route(operation)
        return true
    }

    /// Reads and durability go to the ring. Writes would be handed to a kernel thread each: ext4 has no buffered write
    /// that does not wait, though it seldom does.
    @inline(__always)
    private func route(_ operation: UnsafeMutablePointer<FileOperation>) {
        let isWrite = operation.pointee.kind == .write
        if isWrite, operation.pointee.length <= Self.ownBytes, loop.mayBlock {
            own.append(operation)
        } else if let ring, !isWrite, operation.pointee.kind != .query {
            if operation.pointee.kind == .read, unsubmitted == 0, lone == nil {
                if untried == 0 {
                    lone = operation
                    return
                }
                untried &-= 1
            }
            if let first = lone {
                lone = nil
                enqueue(first, on: ring)
            }
            enqueue(operation, on: ring)
        } else {
            workers.add(operation)
        }
    }

    private func readLone(_ operation: UnsafeMutablePointer<FileOperation>, orOn ring: UnsafeMutablePointer<io_uring>) {
        lone = nil
        let op = operation.pointee
        let count = qbd_read_now(op.descriptor, op.base, op.length, op.offset)
        if count > 0 { return finish(operation, result: Int32(truncatingIfNeeded: count)) }
        untried = count < 0 && errno == EOPNOTSUPP ? .max : Self.untriedAfterMiss
        // That tells what is wrong, or waits for the disk.
        enqueue(operation, on: ring)
    }

    private func enqueue(_ operation: UnsafeMutablePointer<FileOperation>, on ring: UnsafeMutablePointer<io_uring>) {
        // Where there are more completions than there is room for, the kernel needs memory for each, and loses those for
        // which it has none.
        guard onRing < Int(ring.pointee.cq.ring_entries) else { return behindRing.append(operation) }
        guard ringResumes <= loop.now else { return workers.add(operation) }
        var entry = qbd_ring_get_sqe(ring)
        if entry == nil {
            submit(ring)
            entry = qbd_ring_get_sqe(ring)
        }
        guard let entry else { return workers.add(operation) }
        let op = operation.pointee
        switch op.kind {
        case .read:
            io_uring_prep_read(entry, op.descriptor, op.base, UInt32(op.length), op.offset)
        case .synchronize:
            io_uring_prep_fsync(entry, op.descriptor, UInt32(IORING_FSYNC_DATASYNC))
            // A length of 0 is all of the file.
            entry.pointee.off = op.offset
            entry.pointee.len = UInt32(op.length)
        case .allocate:
            io_uring_prep_fallocate(entry, op.descriptor, op.flags, off_t(op.offset), off_t(op.length))
        case .write, .query: preconditionFailure("not for the ring")
        }
        io_uring_sqe_set_data(entry, operation)
        unsubmitted &+= 1
        onRing &+= 1
    }

    private func submit(_ ring: UnsafeMutablePointer<io_uring>) {
        while unsubmitted > 0 {
            let count = io_uring_submit(ring)
            guard count > 0 else { return takeBack(from: ring) }
            unsubmitted &-= Int(count)
        }
    }

    /// The kernel takes nothing more now, for want of memory most likely. The workers do what it did not take, and what
    /// comes within the next milliseconds; then the ring is tried again.
    private func takeBack(from ring: UnsafeMutablePointer<io_uring>) {
        ringResumes = loop.now &+ Self.ringPause
        let queue = ring.pointee.sq
        // The kernel looks at the queue's end during io_uring_enter(2) alone.
        let first = queue.khead.pointee
        var position = first
        while position != queue.sqe_tail {
            let data = queue.sqes[Int(position & queue.ring_mask)].user_data
            if let operation = UnsafeMutablePointer<FileOperation>(bitPattern: UInt(data)) { workers.add(operation) }
            position &+= 1
        }
        while let operation = behindRing.removeFirst() { workers.add(operation) }
        onRing &-= Int(position &- first)
        unsubmitted = 0
        queue.ktail.pointee = first
        ring.pointee.sq.sqe_head = first
        ring.pointee.sq.sqe_tail = first
    }

    // MARK: Completion

    package func ready(events: UInt32) { reap() }

    package func endOfTurn() {
        submitAll()
        if own.head != nil {
            guard writeOwn() else { return }
            submitAll()
            // Started by what that completed.
            if own.head != nil { loop.runAgain() }
        }
        workers.handOver()
    }

    private func submitAll() {
        guard let ring else { return }
        // What completes at once may start more: nothing may stay behind, since nothing would come to submit it.
        while unsubmitted > 0 || lone != nil {
            if let lone {
                readLone(lone, orOn: ring)
                continue
            }
            submit(ring)
            reap()
        }
    }

    /// - Returns: false when this thread is the loop's no more.
    private func writeOwn() -> Bool {
        var bytes = 0
        loop.updateNow()
        while loop.mayBlock, let operation = own.removeFirst() {
            bytes &+= operation.pointee.length
            let call = loop.enterBlocking()
            let result = FileWorkers.perform(operation)
            guard loop.leaveBlocking(call) else {
                workers.deliver(operation, result: result)
                return false
            }
            finish(operation, result: result)
            if bytes >= Self.ownBytes { break }
        }
        guard own.head != nil else { return true }
        if loop.mayBlock {
            // Answers of this turn go out first.
            loop.runAgain()
        } else {
            while let operation = own.removeFirst() { workers.add(operation) }
        }
        return true
    }

    private func reap() {
        guard let ring else { return }
        while let entry = qbd_ring_peek(ring) {
            let result = entry.pointee.res
            let operation = UnsafeMutablePointer<FileOperation>(bitPattern: UInt(entry.pointee.user_data))
            qbd_ring_seen(ring, entry)
            onRing &-= 1
            if let operation { finish(operation, result: result) }
        }
        while onRing < Int(ring.pointee.cq.ring_entries), let operation = behindRing.removeFirst() {
            enqueue(operation, on: ring)
        }
    }

    /// Completes the operation, or goes on with the rest of a short transfer.
    func finish(_ operation: UnsafeMutablePointer<FileOperation>, result: Int32) {
        var result = result
        switch operation.pointee.kind {
        case .read, .write:
            if result == -EINTR || result == -EAGAIN { return route(operation) }
            if result >= 0 {
                let done = Int(result)
                if done < operation.pointee.length, done > 0 {
                    operation.pointee.base = operation.pointee.base.map { $0 + done }
                    operation.pointee.length &-= done
                    operation.pointee.offset &+= UInt64(done)
                    loop.runAgain()
                    return route(operation)
                }
                result = done == 0 && operation.pointee.length > 0 ? -EIO : 0
            }
        case .synchronize, .allocate, .query:
            if result == -EINTR { return route(operation) }
        }
        let context = operation.pointee.context
        operations.give(operation)
        completion.fileOperationCompleted(context, result: result)
    }
}
