import CLinux
import EventLoop
import Glibc

/// A device opened in a way that keeps others from mounting it, from using it as swap and from building a device on
/// it, as long as this lives. All calls may block, for as long as the volume does not answer.
final class DeviceClaim {
    private let descriptor: Int32
    private let path: String

    /// EBUSY when it or one of its partitions is mounted, swapped to or held. Being open in a process is no hindrance.
    ///
    /// Only for a connected device: opening another would keep it busy for the driver.
    init(_ device: KernelDevice) throws(SystemError) {
        path = device.path
        descriptor = try retrying("claim \(device.path)") {
            // Read-only: closing a device that was open for writing makes udev look at it again.
            qbd_open(device.root + device.path, O_RDONLY | O_EXCL | O_CLOEXEC, 0)
        }
    }

    /// The driver is not done with a device while somebody has it open.
    deinit { close(descriptor) }

    /// Writes back what the kernel's cache holds for the device, makes it durable, and forgets it.
    func flush() throws(SystemError) {
        try retrying("write back what the kernel holds for \(path)") { fsync(descriptor) }
        try flushDirty()
    }

    /// The same without a word to the volume when the cache holds nothing that is not written.
    func flushDirty() throws(SystemError) {
        try retrying("drop the cache of \(path)") { qbd_blkflsbuf(descriptor) }
    }
}
