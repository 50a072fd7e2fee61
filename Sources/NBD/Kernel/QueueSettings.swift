import CLinux
import EventLoop
import Glibc

/// What sysfs and ioctls set for a connected device. All calls may block: never on a loop.
///
/// From Linux 6.11 on, a write to any file of the queue waits for all I/O in flight, and holds new I/O up meanwhile. So
/// nothing is written that is there already, and a device that only gets new connections has all of it.
package struct QueueSettings: Sendable {
    private let device: KernelDevice
    private var folder: String { "\(device.folder)/queue" }

    package init(_ device: KernelDevice) { self.device = device }

    /// Sets what is the same for every device. What the kernel does not let us set is no reason not to use it.
    /// - Parameter resendInterval: see `setResendInterval`; nil leaves it as it is.
    /// - Returns: one line for each thing that could not be set.
    package func apply(resendInterval: UInt32?) -> [String] {
        // The volume orders and merges by itself, and a queue in front of it only costs.
        var problems = set("scheduler", "none")
        problems += set("rotational", "0")
        do throws(SystemError) {
            if let limit = try TextFile.readLine("\(folder)/max_hw_sectors_kb") {
                problems += set("max_sectors_kb", limit)
            }
        } catch { problems.append("\(device.path): \(error)") }
        if let resendInterval { problems += setResendInterval(resendInterval) }
        return problems
    }

    /// How long the driver leaves a request with a connection, milliseconds, before it looks whether that still is the
    /// one the request was sent on; requests that were in flight when a daemon died are sent again then. Holds for
    /// requests that begin afterwards.
    ///
    /// With one connection a request on a living connection is left alone, and the kernel logs one line about it each
    /// time. With several the driver **ends** the connection of a request that takes longer.
    package func setResendInterval(_ milliseconds: UInt32) -> [String] {
        set("io_timeout", String(max(milliseconds, 1)))
    }

    private func set(_ name: String, _ value: String) -> [String] {
        do throws(SystemError) {
            let now = try TextFile.readLine("\(folder)/\(name)")
            // Of the schedulers there are, the one in use stands in brackets.
            if now == value || now?.contains("[\(value)]") == true { return [] }
            try TextFile.write(value, to: "\(folder)/\(name)")
            return []
        } catch { return ["\(device.path): \(error)"] }
    }

    /// Reads the partition table of a device just connected or resized. Its partitions are there on return.
    ///
    /// The driver marks the disk, and the kernel looks for partitions when it is opened next, before that open returns;
    /// asking for it by BLKRRPART would remove and make all of them a second time when udev was faster.
    package func scanPartitions() throws(SystemError) {
        let descriptor = try open()
        close(descriptor)
    }

    /// Reads the partition table again. EBUSY when a partition is in use.
    package func rescanPartitions() throws(SystemError) {
        let descriptor = try open()
        defer { close(descriptor) }
        try retrying("read the partition table of \(device.path)") { qbd_blkrrpart(descriptor) }
    }

    /// Makes the device read-only, or writable, for everybody in this host.
    package func setReadOnly(_ readOnly: Bool) throws(SystemError) {
        if try device.isReadOnly == readOnly { return }
        let descriptor = try open()
        defer { close(descriptor) }
        try retrying("make \(device.path) \(readOnly ? "read-only" : "writable")") {
            qbd_blkroset(descriptor, readOnly ? 1 : 0)
        }
    }

    private func open() throws(SystemError) -> Int32 {
        try retrying("open \(device.path)") { qbd_open(device.root + device.path, O_RDONLY | O_CLOEXEC, 0) }
    }
}
