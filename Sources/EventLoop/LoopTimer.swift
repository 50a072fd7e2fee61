/// A one-shot timer of a loop. Lives on the loop's thread; arming it again moves it.
package final class LoopTimer {
    private unowned let loop: EventLoop
    private let fired: () -> Void
    fileprivate var deadline: UInt64 = 0
    fileprivate var position = -1

    package init(loop: EventLoop, fired: @escaping () -> Void) {
        self.loop = loop
        self.fired = fired
    }

    package var isArmed: Bool { position >= 0 }

    /// Fires once, `nanoseconds` after the loop's `now`.
    package func arm(after nanoseconds: UInt64) {
        cancel()
        deadline = loop.now &+ max(nanoseconds, 1)
        loop.timers.insert(self)
    }

    /// Nanoseconds from the loop's `now` until it fires; 0 when that is past. Only while it is armed.
    package var left: UInt64 { deadline > loop.now ? deadline &- loop.now : 0 }

    package func cancel() {
        if position >= 0 { loop.timers.remove(self) }
    }

    fileprivate func fire() { fired() }
}

/// A binary heap of timers by deadline.
struct TimerHeap {
    private var heap: [LoopTimer] = []

    /// The next deadline in nanoseconds of CLOCK_MONOTONIC.
    var earliest: UInt64? { heap.first?.deadline }

    mutating func insert(_ timer: LoopTimer) {
        timer.position = heap.count
        heap.append(timer)
        up(timer.position)
    }

    mutating func remove(_ timer: LoopTimer) {
        let position = timer.position
        timer.position = -1
        let last = heap.removeLast()
        guard last !== timer else { return }
        heap[position] = last
        last.position = position
        up(position)
        down(position)
    }

    mutating func popDue(at now: UInt64) -> LoopTimer? {
        guard let first = heap.first, first.deadline <= now else { return nil }
        remove(first)
        return first
    }

    private mutating func up(_ start: Int) {
        var child = start
        while child > 0 {
            let parent = (child - 1) / 2
            guard heap[child].deadline < heap[parent].deadline else { return }
            exchange(child, parent)
            child = parent
        }
    }

    private mutating func down(_ start: Int) {
        var parent = start
        while true {
            var smallest = parent
            for child in [2 * parent + 1, 2 * parent + 2] where child < heap.count {
                if heap[child].deadline < heap[smallest].deadline { smallest = child }
            }
            guard smallest != parent else { return }
            exchange(parent, smallest)
            parent = smallest
        }
    }

    private mutating func exchange(_ a: Int, _ b: Int) {
        heap.swapAt(a, b)
        heap[a].position = a
        heap[b].position = b
    }
}

extension EventLoop {
    /// Fires every timer that is due; a timer that arms itself again for a time already past waits for the next turn.
    func fireTimers(at now: UInt64) {
        while let timer = timers.popDue(at: now) { timer.fire() }
    }
}
