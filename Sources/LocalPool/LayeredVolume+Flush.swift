import Backend
import EventLoop
import Glibc

/// What is under way towards stable storage.
struct FlushState {
    /// A failed fdatasync: the kernel reports lost writes once, and a later success would say nothing about them. Every
    /// flush fails from then on.
    var error: Int32 = 0
    /// The map file was written to and not synchronised.
    var mapIsBehind = false
    var isRunning = false
    /// Answered when the round that runs is over, and those for the next one.
    var current = IOQueue()
    var next = IOQueue()
    /// Runs being marked, and where to look for more.
    var marking = 0
    var position = 0
    var failure: Int32 = 0
}

// The map file must not say that the head has a cluster before the data is there to stay: what was flushed long ago would
// be replaced by what a power cut left of a newer write. So a flush is a round: synchronise the data, then mark the
// clusters whose data that was, then synchronise the map file. Flushes that come meanwhile share the next round. Where
// nothing is fresh, which is the usual case, it is one fdatasync.
extension LayeredVolume {
    /// The most writes to the map file at a time.
    private static let markedAtOnce = 64

    /// A flush, or the rest of what is to be durable.
    func synchronize(_ io: UnsafeMutablePointer<IO>) {
        guard flush.error == 0 else { return finish(io, flush.error) }
        guard let ring else { return finish(io, EIO) }
        io.pointee.operation = .flush
        if !flush.isRunning, map.fresh == 0, !flush.mapIsBehind {
            if !ring.synchronize(head, context: UnsafeMutableRawPointer(io)) { finish(io, EAGAIN) }
            return
        }
        flush.next.append(io)
        if !flush.isRunning { startRound() }
    }

    private func startRound() {
        guard let ring else { return }
        flush.isRunning = true
        flush.current = flush.next
        flush.next = IOQueue()
        flush.failure = 0
        flush.position = 0
        _ = map.settleFresh()
        flush.mapIsBehind = false
        if !ring.synchronize(head, context: dataSynchronized) { endRound(EAGAIN) }
    }

    func flushStepCompleted(_ context: UnsafeMutableRawPointer, _ code: Int32) {
        if context == dataSynchronized {
            guard code == 0 else { return failRound(code) }
            markMore()
        } else if context == runMarked {
            flush.marking -= 1
            if code != 0 { flush.failure = code }
            markMore()
        } else {
            guard code == 0 else { return failRound(code) }
            map.markSettled()
            endRound(0)
        }
    }

    private func markMore() {
        guard let ring, let mapFile = volume.mapFile else { return failRound(EIO) }
        while flush.failure == 0, flush.marking < Self.markedAtOnce,
            let run = map.nextSettling(from: flush.position)
        {
            guard
                ring.write(
                    mapFile.descriptor, from: UnsafeMutableRawPointer(mutating: Ones.bytes), length: run.count,
                    offset: Layer.headerSize + UInt64(run.lowerBound), durable: false, context: runMarked)
            else {
                flush.failure = EAGAIN
                break
            }
            flush.position = run.upperBound
            flush.marking += 1
        }
        guard flush.marking == 0 else { return }
        guard flush.failure == 0 else { return failRound(flush.failure) }
        if !ring.synchronize(mapFile.descriptor, context: mapSynchronized) { failRound(EAGAIN) }
    }

    private func failRound(_ code: Int32) {
        map.unsettle()
        flush.mapIsBehind = true
        flush.error = code
        endRound(code)
    }

    private func endRound(_ code: Int32) {
        flush.isRunning = false
        var done = flush.current
        flush.current = IOQueue()
        while let io = done.popFirst() { finish(io, code) }
        if flush.isRunning || flush.next.isEmpty { return }
        if flush.error != 0 {
            var rest = flush.next
            flush.next = IOQueue()
            while let io = rest.popFirst() { finish(io, flush.error) }
        } else {
            startRound()
        }
    }
}
