import Backend
import EventLoop
import Glibc

/// What is under way towards stable storage.
struct FlushState {
    /// A failed fdatasync: the kernel reports lost writes once, and a later success would say nothing about them. Every
    /// flush fails from then on.
    var error: Int32 = 0
    var isRunning = false
    /// The round goes on with the map file.
    var marks = false
    /// Answered when the round that runs is over, and those for the next one.
    var current = IOQueue()
    var next = FlushQueue()
    /// Runs being marked, and where to look for more.
    var marking = 0
    var position = 0
    var failure: Int32 = 0
}

// The map file must not say for good that the head has a cluster before the data is there to stay: what was flushed long
// ago would be replaced by what a power cut left of a newer write. So a flush is a round: synchronise the data, then mark the
// clusters whose data that was, then synchronise the map file. Flushes that come meanwhile share the next round. Where
// nothing is fresh, which is the usual case, and for writes to what the map file has already, it is one fdatasync.
extension LayeredVolume {
    /// A flush, or the rest of what is to be durable.
    /// - Parameter all: whether that is more than the data of a write.
    func synchronize(_ io: UnsafeMutablePointer<IO>, all: Bool = true) {
        guard flush.error == 0 else { return finish(io, flush.error) }
        flush.next.append(io, all: all)
        if !flush.isRunning { startRound() }
    }

    private func startRound() {
        guard let ring else { return }
        flush.isRunning = true
        let range = flush.next.range
        flush.current = flush.next.takeAll()
        flush.failure = 0
        flush.position = 0
        flush.marks = false
        if range == nil { flush.marks = map.settleFresh() }
        if !ring.synchronize(head, range: range, context: dataSynchronized) { failRound(EAGAIN) }
    }

    func flushStepCompleted(_ context: UnsafeMutableRawPointer, _ code: Int32) {
        // A snapshot that was given up may have seen it fail meanwhile.
        let failed = code != 0 || volume.hasFailed.load(ordering: .relaxed)
        if context == dataSynchronized {
            guard !failed else { return failRound(code, isFinal: true) }
            if flush.marks { markMore() } else { endRound(0) }
        } else if context == runMarked {
            flush.marking -= 1
            if code != 0 { flush.failure = code }
            markMore()
        } else {
            guard !failed else { return failRound(code, isFinal: true) }
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
                    mapFile.descriptor, from: UnsafeMutableRawPointer(mutating: Marks.bytes(Layer.Mark.lasting)),
                    length: run.count,
                    offset: Layer.headerSize + UInt64(run.lowerBound), context: runMarked)
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

    /// - Parameter isFinal: something could not be synchronised; otherwise the next round begins where this one did.
    private func failRound(_ code: Int32, isFinal: Bool = false) {
        if flush.marks { map.unsettle() }
        // Whatever the reason was, it does not help to remove it.
        if isFinal {
            flush.error = EIO
            client.flushesFail()
        }
        endRound(isFinal ? EIO : code)
    }

    private func endRound(_ code: Int32) {
        flush.isRunning = false
        var done = flush.current
        flush.current = IOQueue()
        if flush.error != 0 {
            var rest = flush.next.takeAll()
            while let io = rest.popFirst() { done.append(io) }
        } else if !flush.next.isEmpty {
            startRound()
        }
        while let io = done.popFirst() { finish(io, code) }
    }
}
