import EventLoop
import NBD

/// A volume's limits and what waits under them. On the volume's loop.
struct Throttle {
    var limits = ThrottleLimits.none
    var read = ThrottleLane()
    var write = ThrottleLane()
    /// Reads wait for reads and writes for writes, each in the order they came.
    var waitingReads = RequestQueue()
    var waitingWrites = RequestQueue()
    /// Armed only while something waits.
    var timer: LoopTimer?

    var waiting: Int { waitingReads.count &+ waitingWrites.count }

    /// The loop's `now` when the oldest of what waits arrived.
    var oldestArrival: UInt64? {
        let read = waitingReads.first?.pointee.arrival
        let write = waitingWrites.first?.pointee.arrival
        return switch (read, write) {
        case (let read?, let write?): min(read, write)
        default: read ?? write
        }
    }

    mutating func popFirst() -> UnsafeMutablePointer<Request>? {
        waitingReads.popFirst() ?? waitingWrites.popFirst()
    }

    /// Takes out what a session brought.
    mutating func take(of session: Session) -> (reads: RequestQueue, writes: RequestQueue) {
        (
            waitingReads.take { $0.belongs(to: session) },
            waitingWrites.take { $0.belongs(to: session) }
        )
    }

    mutating func set(_ new: ThrottleLimits, now: UInt64) {
        limits = new
        read.set(bytes: new.readBytes, operations: new.readOperations, burst: new.burst, now: now)
        write.set(bytes: new.writeBytes, operations: new.writeOperations, burst: new.burst, now: now)
    }
}

// The throttle stands behind the gate: what it holds has arrived before anything the gate holds.
extension Volume {
    /// Changes the limits; holds at once, also for what waits. From any thread.
    func setLimits(_ limits: ThrottleLimits) async {
        _ = await loop.call { [self] in
            throttle.set(limits, now: loop.now)
            settleAdmission()
            letPass()
            loop.runAgain()
        }
    }

    /// Runs the request now, or when its limits let it.
    @inline(__always)
    func passThrottle(_ request: UnsafeMutablePointer<Request>) {
        var wait: UInt64 = 0
        switch request.pointee.command {
        case .read:
            if throttle.waitingReads.isEmpty {
                wait = throttle.read.pass(bytes: UInt64(request.pointee.length), now: loop.now)
                if wait == 0 { return letThrough(request) }
            }
            throttle.waitingReads.append(request)
        case .write, .writeZeroes, .trim:
            if throttle.waitingWrites.isEmpty {
                wait = throttle.write.pass(bytes: Self.writtenBytes(request), now: loop.now)
                if wait == 0 { return letThrough(request) }
            }
            throttle.waitingWrites.append(request)
        case .flush, .cache, .blockStatus, .disconnect: return letThrough(request)
        }
        request.pointee.place = .throttle
        if wait > 0 { wake(after: wait) }
    }

    /// Zeroes count as if they were sent, as QEMU has it; a trim writes nothing.
    @inline(__always)
    private static func writtenBytes(_ request: UnsafeMutablePointer<Request>) -> UInt64 {
        request.pointee.command == .trim ? 0 : UInt64(request.pointee.length)
    }

    /// Runs what waits, in its order, as far as the limits let it now.
    func letPass() {
        // A suspended volume lets nothing pass; it comes back here.
        guard gate.state == .normal else { return }
        var next = UInt64.max
        while let request = throttle.waitingReads.first {
            let wait = throttle.read.pass(bytes: UInt64(request.pointee.length), now: loop.now)
            guard wait == 0 else {
                next = wait
                break
            }
            _ = throttle.waitingReads.popFirst()
            letThrough(request)
        }
        while let request = throttle.waitingWrites.first {
            let wait = throttle.write.pass(bytes: Self.writtenBytes(request), now: loop.now)
            guard wait == 0 else {
                next = min(next, wait)
                break
            }
            _ = throttle.waitingWrites.popFirst()
            letThrough(request)
        }
        throttle.timer?.cancel()
        if next < .max { wake(after: next) }
    }

    private func wake(after nanoseconds: UInt64) {
        let timer = throttle.timer ?? LoopTimer(loop: loop) { [unowned self] in letPass() }
        throttle.timer = timer
        let earlier = timer.isArmed && timer.left <= nanoseconds
        if !earlier { timer.arm(after: nanoseconds) }
    }
}
