import Backend
import EventLoop
import Glibc
import NBD

// Requests are cut at the backend's limits. Parts come from a slab; a request that needs more than are left is handed
// over piece by piece as parts come back, and those behind it wait in their order.
extension Volume {
    @inline(__always)
    func issue(_ request: UnsafeMutablePointer<Request>) {
        atStore &+= 1
        request.pointee.next = nil
        if firstWaiting != nil {
            lastWaiting?.pointee.next = request
            lastWaiting = request
        } else if !hand(over: request) {
            firstWaiting = request
            lastWaiting = request
        }
    }

    /// - Returns: false when parts ran out before all of the request was handed over.
    @inline(__always)
    private func hand(over request: UnsafeMutablePointer<Request>) -> Bool {
        // It was held back until after its connection was gone. The kernel has sent it again on another, and must not see
        // it overtake what came after that.
        if request.pointee.issued == 0, request.pointee.isAbandoned {
            answer(request)
            return true
        }
        let operation = Self.operation(request.pointee.command)
        if request.pointee.length == 0, operation != .flush {
            answer(request)
            return true
        }
        guard let backend else {
            request.pointee.status = EIO
            answer(request)
            return true
        }
        // One part is owed until the last is handed over, so that an early completion does not answer too soon.
        if request.pointee.issued == 0 { request.pointee.pendingParts = 1 }
        let geometry = backend.geometry
        repeat {
            let offset = request.pointee.offset &+ UInt64(request.pointee.issued)
            let length = Self.partLength(
                operation, offset: offset, left: request.pointee.length &- request.pointee.issued, geometry)
            guard let part = parts.take() else { return false }
            part.initialize(
                to: IO(operation: operation, offset: offset, length: length, request: UnsafeMutableRawPointer(request)))
            describe(part, of: request)
            request.pointee.issued &+= length
            request.pointee.pendingParts &+= 1
            backend.submit(part)
        } while request.pointee.issued < request.pointee.length && operation != .flush && operation != .extents
        settle(request)
        return true
    }

    @inline(__always)
    private func describe(_ part: UnsafeMutablePointer<IO>, of request: UnsafeMutablePointer<Request>) {
        switch part.pointee.operation {
        case .write:
            part.pointee.durable = request.pointee.durable
            if let payload = request.pointee.payload {
                part.pointee.segment = Segment(
                    base: payload + Int(request.pointee.issued), count: Int(part.pointee.length))
            }
        case .read, .extents:
            let segment = UnsafeMutableRawPointer(part).assumingMemoryBound(to: Segment.self)
            if let last = request.pointee.lastSegment {
                last.pointee.next = segment
            } else {
                request.pointee.segments = segment
                request.pointee.firstSegment = segment
            }
            request.pointee.lastSegment = segment
        case .writeZeroes:
            part.pointee.durable = request.pointee.durable
            part.pointee.mayPunch = !request.pointee.noHole
            part.pointee.fast = request.pointee.fastZero
        case .trim: part.pointee.durable = request.pointee.durable
        case .flush, .cache: break
        }
    }

    /// The largest piece that stays inside the backend's limits.
    @inline(__always)
    package static func partLength(_ operation: Operation, offset: UInt64, left: UInt32, _ geometry: Geometry) -> UInt32
    {
        var length = left
        if operation == .read || operation == .write {
            length = min(length, geometry.maximumTransfer)
            if geometry.transferBoundary > 0 {
                let room = geometry.transferBoundary &- offset & (geometry.transferBoundary &- 1)
                if UInt64(length) > room { length = UInt32(room) }
            }
        }
        if geometry.boundary > 0 {
            let room = geometry.boundary &- offset & (geometry.boundary &- 1)
            if UInt64(length) > room { length = UInt32(room) }
        }
        return length
    }

    @inline(__always)
    private static func operation(_ command: Command) -> Operation {
        switch command {
        case .read: .read
        case .write: .write
        case .flush, .disconnect: .flush
        case .trim: .trim
        case .cache: .cache
        case .writeZeroes: .writeZeroes
        case .blockStatus: .extents
        }
    }

    // MARK: Completion

    package func completed(_ part: UnsafeMutablePointer<IO>) {
        let request = part.pointee.request.assumingMemoryBound(to: Request.self)
        if part.pointee.status != 0 {
            if request.pointee.status == 0 { request.pointee.status = part.pointee.status }
            noticeFailure(part)
            // Nobody hears of a failure that the next daemon would not know of.
            if unanswered?.append(part) != nil { return }
        } else if watch.health.refusesWrites {
            noticeSuccess(part)
        }
        finish(part)
    }

    @inline(__always)
    func finish(_ part: UnsafeMutablePointer<IO>) {
        let request = part.pointee.request.assumingMemoryBound(to: Request.self)
        switch request.pointee.command {
        case .read: break
        case .blockStatus: if request.pointee.oneExtent { keepOneExtent(part) }
        default: parts.give(part)
        }
        settle(request)
        if firstWaiting != nil { handOverWaiting() }
    }

    /// REQ_ONE: a single extent that does not go beyond the request.
    private func keepOneExtent(_ part: UnsafeMutablePointer<IO>) {
        part.pointee.segment.count = min(part.pointee.segment.count, MemoryLayout<Extent>.stride)
    }

    @inline(__always)
    private func settle(_ request: UnsafeMutablePointer<Request>) {
        request.pointee.pendingParts &-= 1
        if request.pointee.pendingParts == 0 { answer(request) }
    }

    @inline(__always)
    private func answer(_ request: UnsafeMutablePointer<Request>) {
        atStore &-= 1
        if loop.now &- request.pointee.admitted > watch.slowIO { noticeLate(request) }
        if atStore == 0, needsAdmission { storeIsQuiet() }
        request.reply()
    }

    /// Parts of reads are kept until their reply is out: it is written from them.
    @inline(__always)
    func freeParts(of request: UnsafeMutablePointer<Request>) {
        guard request.pointee.firstSegment != nil else { return }
        var segment = request.pointee.firstSegment
        while let current = segment {
            segment = current.pointee.next
            let part = UnsafeMutableRawPointer(current).assumingMemoryBound(to: IO.self)
            if part.pointee.ownsBuffer, let buffer = part.pointee.buffer { buffers.free(buffer) }
            if let pipe = part.pointee.pipe {
                // An error is answered without the data of the parts that had none.
                pipes?.give(pipe, isEmpty: request.pointee.isSent && request.pointee.segments != nil)
            }
            parts.give(part)
        }
        if firstWaiting != nil { handOverWaiting() }
    }

    private func handOverWaiting() {
        // What is handed over now may have missed the backend's end of turn.
        defer { loop.runAgain() }
        while let request = firstWaiting {
            let next = request.pointee.next
            // Answering may come back here; the queue is in order before.
            firstWaiting = nil
            if !hand(over: request) {
                request.pointee.next = next
                firstWaiting = request
                return
            }
            firstWaiting = next
        }
        lastWaiting = nil
    }
}
