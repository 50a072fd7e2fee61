import Backend
import CLinux
import EventLoop
import Glibc

/// One cluster on its way into the head, or a run of clusters on its way to be zeros there.
struct Takeover {
    enum Step: UInt8 {
        /// What is below is read into the buffer.
        case reading
        /// The cluster is written to the head.
        case writing
        /// The run's data is removed from the head.
        case clearing
        /// The map file is told that the head has the run.
        case marking
        /// That failed, and is taken back.
        case unmarking
    }

    var io: UnsafeMutablePointer<IO>
    var step: Step
    var first: Int
    var count: Int
    var buffer: Buffer?
    /// Whether it has the head for itself, as a run of zeros.
    var isExclusive = false
    /// Why it failed, while that is taken back.
    var failure: Int32 = 0
}

extension LayeredVolume {
    private func context(_ takeover: UnsafeMutablePointer<Takeover>) -> UnsafeMutableRawPointer {
        UnsafeMutableRawPointer(takeover) + 1
    }

    // MARK: Writes

    @inline(__always)
    func write(_ io: UnsafeMutablePointer<IO>) {
        if map.isHead(cluster(io)) { return writeToHead(io) }
        if !takeOver(io) { waiting.append(io) }
    }

    private func writeToHead(_ io: UnsafeMutablePointer<IO>) {
        guard let ring else { return finish(io, EIO) }
        let accepted = ring.write(
            head, from: io.pointee.segment.base, length: Int(io.pointee.length), offset: io.pointee.offset,
            context: UnsafeMutableRawPointer(io))
        if !accepted { finish(io, EAGAIN) }
    }

    /// A write to a cluster of the head is done.
    func written(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        guard code == 0, io.pointee.durable else { return finish(io, code) }
        synchronize(io, all: map.stages[cluster(io)] != ChainMap.Stage.marked)
    }

    /// Begins to take the cluster of a write, or of a piece of zeros, into the head.
    /// - Returns: false when it has to wait.
    private func takeOver(_ io: UnsafeMutablePointer<IO>) -> Bool {
        let cluster = cluster(io)
        guard !isExclusive, zeroingWaits == 0, !isLocked[cluster % Self.locks], let takeover = takeovers.take() else {
            return false
        }
        guard let ring else {
            takeovers.give(takeover)
            finish(io, EIO)
            return true
        }
        takeover.initialize(to: Takeover(io: io, step: .writing, first: cluster, count: 1))
        let start = UInt64(cluster) * Layer.cluster
        var accepted: Bool
        if io.pointee.operation == .write, UInt64(io.pointee.length) == Layer.cluster {
            accepted = ring.write(
                head, from: io.pointee.segment.base, length: Int(Layer.cluster), offset: start,
                context: context(takeover))
        } else {
            guard let buffer = buffers.allocate(Int(Layer.cluster)) else {
                takeovers.give(takeover)
                finish(io, ENOMEM)
                return true
            }
            takeover.pointee.buffer = buffer
            takeover.pointee.step = .reading
            accepted = ring.read(
                descriptor(of: cluster), into: buffer.base, length: Int(Layer.cluster), offset: start,
                context: context(takeover))
            if !accepted { buffers.free(buffer) }
        }
        guard accepted else {
            takeovers.give(takeover)
            finish(io, EAGAIN)
            return true
        }
        isLocked[cluster % Self.locks] = true
        return true
    }

    func takeoverCompleted(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        switch takeover.pointee.step {
        case .reading:
            guard code == 0, let ring, let buffer = takeover.pointee.buffer else { return end(takeover, max(code, 1)) }
            let io = takeover.pointee.io
            let place = buffer.base + Int(io.pointee.offset % Layer.cluster)
            let length = takenLength(io)
            if io.pointee.operation == .write {
                place.copyMemory(from: io.pointee.segment.base, byteCount: length)
            } else {
                memset(place, 0, length)
            }
            takeover.pointee.step = .writing
            let accepted = ring.write(
                head, from: buffer.base, length: Int(Layer.cluster),
                offset: UInt64(takeover.pointee.first) * Layer.cluster, context: context(takeover))
            if !accepted { end(takeover, EAGAIN) }
        case .writing: if code == 0 { mark(takeover) } else { end(takeover, code) }
        case .clearing: cleared(takeover, code)
        case .marking:
            guard code == 0 else { return unmark(takeover, code) }
            for cluster in takeover.pointee.first..<takeover.pointee.first + takeover.pointee.count {
                map.take(cluster)
            }
            finish(takeover, 0)
        case .unmarking:
            // Memory and map file disagree, and a daemon that comes after a crash would believe the latter.
            if code != 0 { stopWriting(code) }
            finish(takeover, takeover.pointee.failure)
        }
    }

    /// The data is in the head's file: the map file is told before anybody else. Who finds no mark after a crash, or one of
    /// another boot, goes by what is below.
    private func mark(_ takeover: UnsafeMutablePointer<Takeover>) {
        write(takeover, .marking, Layer.Mark.inThisBoot)
    }

    /// Some of the marks may be there.
    private func unmark(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        takeover.pointee.failure = code
        write(takeover, .unmarking, Layer.Mark.absent)
    }

    private func write(_ takeover: UnsafeMutablePointer<Takeover>, _ step: Takeover.Step, _ mark: UInt8) {
        takeover.pointee.step = step
        guard let ring, let mapFile = volume.mapFile,
            ring.write(
                mapFile.descriptor, from: UnsafeMutableRawPointer(mutating: Marks.bytes(mark)),
                length: takeover.pointee.count, offset: Layer.headerSize + UInt64(takeover.pointee.first),
                context: context(takeover))
        else { return takeoverCompleted(takeover, EAGAIN) }
    }

    /// Every write fails from now on, until the volume is mapped anew.
    private func stopWriting(_ code: Int32) {
        isStopped = true
        volume.stop(
            BackendError(
                code: EIO,
                message: "\(volume.mapFile?.path ?? "") could not be written to, nor that taken back"
                    + " (\(errnoText(code))): all writes fail until the volume is mapped anew"))
    }

    private func finish(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        if takeover.pointee.isExclusive { endExclusive(takeover, code) } else { end(takeover, code) }
    }

    /// Bytes of the I/O in its first cluster.
    private func takenLength(_ io: UnsafeMutablePointer<IO>) -> Int {
        Int(min(UInt64(io.pointee.length), Layer.cluster - io.pointee.offset % Layer.cluster))
    }

    /// The cluster is the head's, or stays where it was.
    private func end(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        let io = takeover.pointee.io
        if let buffer = takeover.pointee.buffer { buffers.free(buffer) }
        isLocked[takeover.pointee.first % Self.locks] = false
        takeovers.give(takeover)
        if io.pointee.operation != .write {
            if code == 0 { advance(io, takenLength(io)) } else { finish(io, code) }
        } else if code == 0, io.pointee.durable {
            synchronize(io)
        } else {
            finish(io, code)
        }
        serveWaiting()
    }

    /// Lets go on what a lock held up, in order. What has to be alone holds up whatever came after it, or it would never
    /// be.
    private func serveWaiting() {
        // Completing I/O may come back here.
        guard !waiting.isEmpty, !isServingWaiting, !isExclusive else { return }
        isServingWaiting = true
        var waited = waiting
        waiting = IOQueue()
        zeroingWaits = 0
        while let io = waited.popFirst() {
            if io.pointee.operation == .write { write(io) } else { zero(io) }
        }
        isServingWaiting = false
    }

    // MARK: Zeros

    // A piece at a time; offset and length of the I/O are what is left.

    func zero(_ io: UnsafeMutablePointer<IO>) {
        guard io.pointee.length > 0 else { return allZeroed(io) }
        let first = cluster(io)
        let end = io.pointee.offset + UInt64(io.pointee.length)
        // The last cluster of the volume may be short, and is whole all the same.
        let wholeEnd = end == geometry.size ? map.clusters : Int(end / Layer.cluster)
        if io.pointee.offset % Layer.cluster == 0, first < wholeEnd {
            let limit = min(wholeEnd - first, Marks.count)
            if map.isHead(first) {
                var count = 1
                while count < limit, map.isHead(first + count) { count += 1 }
                return clear(io, min(UInt64(count) * Layer.cluster, end - io.pointee.offset))
            }
            if clearingMode(io) != nil {
                var count = 1
                while count < limit, !map.isHead(first + count) { count += 1 }
                return takeZeros(io, first, count)
            }
        }
        if map.isHead(first) { return clear(io, UInt64(takenLength(io))) }
        // What is trimmed may keep its contents.
        if io.pointee.operation == .trim { return advance(io, takenLength(io)) }
        if !takeOver(io) { waiting.append(io) }
    }

    /// In a cluster that the head has, a hole is zeros.
    private func clear(_ io: UnsafeMutablePointer<IO>, _ length: UInt64) {
        guard let ring else { return finish(io, EIO) }
        guard let mode = clearingMode(io) else {
            return io.pointee.operation == .trim ? advance(io, Int(length)) : writeZeros(io)
        }
        io.pointee.segment.count = Int(length)
        let accepted = ring.allocate(
            head, mode: mode, offset: io.pointee.offset, length: Int(length), context: UnsafeMutableRawPointer(io))
        if !accepted { finish(io, EAGAIN) }
    }

    private func clearingMode(_ io: UnsafeMutablePointer<IO>) -> Int32? {
        if io.pointee.operation == .trim || io.pointee.mayPunch, canPunch {
            return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        }
        return canZero ? FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE : nil
    }

    /// The file system can neither punch nor zero.
    private func writeZeros(_ io: UnsafeMutablePointer<IO>) {
        guard let ring else { return finish(io, EIO) }
        let length = takenLength(io)
        io.pointee.segment = Segment(base: Zeros.bytes, count: length)
        let accepted = ring.write(
            head, from: Zeros.bytes, length: length, offset: io.pointee.offset,
            context: UnsafeMutableRawPointer(io))
        if !accepted { finish(io, EAGAIN) }
    }

    /// A piece that was cleared or written is done.
    func zeroed(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        if code == EOPNOTSUPP, io.pointee.segment.base != Zeros.bytes {
            giveUpClearing(io)
            return zero(io)
        }
        guard code == 0 else { return finish(io, code) }
        advance(io, io.pointee.segment.count)
    }

    /// The file system cannot do what was tried. Several may find that out at the same time.
    private func giveUpClearing(_ io: UnsafeMutablePointer<IO>) {
        if io.pointee.operation == .trim || io.pointee.mayPunch, canPunch { canPunch = false } else { canZero = false }
    }

    private func advance(_ io: UnsafeMutablePointer<IO>, _ length: Int) {
        io.pointee.offset += UInt64(length)
        io.pointee.length -= UInt32(length)
        zero(io)
    }

    private func allZeroed(_ io: UnsafeMutablePointer<IO>) {
        if io.pointee.durable { synchronize(io) } else { finish(io, 0) }
    }

    /// Whole clusters become the head's, as holes. What was begun there and never counted goes first, and then the map
    /// file is told: a daemon that dies in between leaves the range as it was.
    private func takeZeros(_ io: UnsafeMutablePointer<IO>, _ first: Int, _ count: Int) {
        guard takeovers.inUse == 0, !isExclusive, let takeover = takeovers.take() else {
            zeroingWaits += 1
            return waiting.append(io)
        }
        isExclusive = true
        takeover.initialize(to: Takeover(io: io, step: .clearing, first: first, count: count, isExclusive: true))
        clear(takeover)
    }

    private func clear(_ takeover: UnsafeMutablePointer<Takeover>) {
        guard let mode = clearingMode(takeover.pointee.io) else {
            // It cannot be zeroed as a whole: cluster by cluster, then.
            let io = takeover.pointee.io
            takeovers.give(takeover)
            isExclusive = false
            zero(io)
            return serveWaiting()
        }
        guard let ring,
            ring.allocate(
                head, mode: mode, offset: UInt64(takeover.pointee.first) * Layer.cluster,
                length: takeover.pointee.count * Int(Layer.cluster), context: context(takeover))
        else { return endExclusive(takeover, EAGAIN) }
    }

    private func cleared(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        if code == EOPNOTSUPP {
            giveUpClearing(takeover.pointee.io)
            return clear(takeover)
        }
        if code == 0 { mark(takeover) } else { endExclusive(takeover, code) }
    }

    private func endExclusive(_ takeover: UnsafeMutablePointer<Takeover>, _ code: Int32) {
        let io = takeover.pointee.io
        let end = UInt64(takeover.pointee.first + takeover.pointee.count) * Layer.cluster
        let length = min(end, io.pointee.offset + UInt64(io.pointee.length)) - io.pointee.offset
        takeovers.give(takeover)
        isExclusive = false
        if code == 0 { advance(io, Int(length)) } else { finish(io, code) }
        serveWaiting()
    }
}

/// A cluster of zeros to write from.
enum Zeros {
    nonisolated(unsafe) static let bytes: UnsafeMutableRawPointer = {
        let bytes = UnsafeMutableRawPointer.allocate(byteCount: Int(Layer.cluster), alignment: 4096)
        memset(bytes, 0, Int(Layer.cluster))
        return bytes
    }()
}
