import CLinux
import Glibc

/// A counting semaphore between threads of this process.
package final class Semaphore: @unchecked Sendable {
    private let semaphore: UnsafeMutablePointer<sem_t>

    package init() {
        semaphore = .allocate(capacity: 1)
        sem_init(semaphore, 0, 0)
    }

    deinit {
        sem_destroy(semaphore)
        semaphore.deallocate()
    }

    package func signal() { sem_post(semaphore) }

    package func wait() {
        while sem_wait(semaphore) != 0 {}
    }

    /// - Returns: false when there was no signal for so long.
    package func wait(nanoseconds: UInt64) -> Bool {
        var now = timespec()
        clock_gettime(CLOCK_MONOTONIC, &now)
        let total = UInt64(now.tv_nsec) + nanoseconds % 1_000_000_000
        var deadline = timespec(
            tv_sec: now.tv_sec + Int(clamping: nanoseconds / 1_000_000_000 + total / 1_000_000_000),
            tv_nsec: Int(total % 1_000_000_000))
        while qbd_semaphore_wait(semaphore, &deadline) != 0 { if errno == ETIMEDOUT { return false } }
        return true
    }
}
