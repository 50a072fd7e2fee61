import CLinux
import Glibc

/// A fixed number of slots for plain values at addresses that never move, taken and given back in LIFO order so that
/// a shallow queue stays in the cache. Memory is touched when a slot is first used. Lives on one thread.
package struct Slab<Element>: ~Copyable {
    package let capacity: Int
    package private(set) var inUse = 0
    private let slots: UnsafeMutablePointer<Element>
    private let free: UnsafeMutablePointer<UnsafeMutablePointer<Element>>
    private var freeCount = 0
    private var fresh = 0

    /// - Precondition: `Element` is trivial: slots come with whatever they held before.
    package init(capacity: Int) {
        precondition(_isPOD(Element.self))
        self.capacity = capacity
        slots = .allocate(capacity: capacity)
        free = .allocate(capacity: capacity)
    }

    /// The same where there are so many that the system may refuse them.
    package init(of capacity: Int) throws(SystemError) {
        precondition(_isPOD(Element.self))
        precondition(MemoryLayout<Element>.alignment <= MemoryLayout<max_align_t>.alignment)
        let slots = malloc(capacity * MemoryLayout<Element>.stride)
        let free = malloc(capacity * MemoryLayout<UnsafeMutablePointer<Element>>.stride)
        guard let slots, let free else {
            Glibc.free(slots)
            Glibc.free(free)
            throw SystemError(code: ENOMEM, operation: "allocate \(capacity) slots")
        }
        self.capacity = capacity
        self.slots = slots.bindMemory(to: Element.self, capacity: capacity)
        self.free = free.bindMemory(to: UnsafeMutablePointer<Element>.self, capacity: capacity)
    }

    deinit {
        // As allocate(capacity:) has it from malloc(3), too.
        Glibc.free(slots)
        Glibc.free(free)
    }

    /// An uninitialised slot, or nil when all are taken.
    @inline(__always)
    package mutating func take() -> UnsafeMutablePointer<Element>? {
        if freeCount > 0 {
            freeCount &-= 1
            inUse &+= 1
            return free[freeCount]
        }
        guard fresh < capacity else { return nil }
        fresh &+= 1
        inUse &+= 1
        return slots + (fresh &- 1)
    }

    /// Every slot that was ever taken, also those that are free now.
    package func forEachTouched(_ body: (UnsafeMutablePointer<Element>) -> Void) {
        for index in 0..<fresh { body(slots + index) }
    }

    @inline(__always)
    package mutating func give(_ slot: UnsafeMutablePointer<Element>) {
        free[freeCount] = slot
        freeCount &+= 1
        inUse &-= 1
    }
}
