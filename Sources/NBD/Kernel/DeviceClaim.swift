import CLinux
import EventLoop
import Glibc
import Synchronization

/// A device opened in a way that keeps others from mounting it, from using it as swap and from building a device on
/// it, until it is released. All calls may block: never on a loop.
package final class DeviceClaim: Sendable {
    /// -1 when released.
    private let descriptor: Atomic<Int32>
    private let path: String

    /// EBUSY when it or one of its partitions is mounted, swapped to or held. Being open in a process is no hindrance.
    ///
    /// Only for a connected device: opening another would keep it busy for the driver.
    package init(_ device: KernelDevice) throws(SystemError) {
        path = device.path
        descriptor = Atomic(
            try retrying("claim \(device.path)") {
                // Read-only: closing a device that was open for writing makes udev look at it again.
                qbd_open(device.root + device.path, O_RDONLY | O_EXCL | O_CLOEXEC, 0)
            })
    }

    deinit { release() }

    /// Gives the claim back. The driver is not done with a device while somebody has it open.
    package func release() {
        let descriptor = descriptor.exchange(-1, ordering: .relaxed)
        if descriptor >= 0 { close(descriptor) }
    }

    /// Writes back what the kernel's cache holds for the device, makes it durable, and forgets it. Waits for the volume.
    package func flush() throws(SystemError) {
        let descriptor = descriptor.load(ordering: .relaxed)
        try retrying("write back what the kernel holds for \(path)") { fsync(descriptor) }
        try flushDirty()
    }

    /// The same without a word to the volume when the cache holds nothing that is not written.
    package func flushDirty() throws(SystemError) {
        let descriptor = descriptor.load(ordering: .relaxed)
        try retrying("drop the cache of \(path)") { qbd_blkflsbuf(descriptor) }
    }
}
