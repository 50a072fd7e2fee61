import EventLoop
import Glibc

/// The kernel's NBD client, over generic netlink. Every call may block: never on a loop. Needs CAP_SYS_ADMIN in the
/// first user namespace.
package struct KernelDevices: Sendable {
    /// Seconds until a kernel that says nothing counts as an error. It answers within the request, so this bounds
    /// nothing the kernel does; only a bug makes it pass.
    static let answerTimeout = 30
    /// Nanoseconds between the first two tries and between two later ones. The kernel logs each that fails.
    private static let retryIntervals: (first: UInt64, most: UInt64) = (10_000_000, 200_000_000)

    /// Where /sys is; tests put a folder here.
    let root: String

    package init(root: String = "") { self.root = root }

    // MARK: What the kernel can do

    /// Makes a device. It has its size, its `backend` and all connections when this returns, and sends requests as
    /// soon as anybody opens it.
    ///
    /// The sockets stay the caller's to close; the kernel holds on to them by itself.
    /// - Parameter busyTimeout: seconds to try again for while the device is busy: udev opens every device of a module
    ///   just loaded, and again when one was disconnected.
    /// - Returns: the X of /dev/nbdX.
    package func connect(_ connect: KernelConnect, busyTimeout: Double = 5) throws(KernelDeviceError) -> UInt32 {
        let target = connect.index.map { "/dev/nbd\($0)" } ?? "a free device"
        let deadline = Deadline(seconds: busyTimeout)
        var interval = Self.retryIntervals.first
        while true {
            do throws(KernelDeviceError) {
                let answers = try perform(connect.message, "connect \(target)")
                let index = try self.index(of: connect, answers)
                try checkBackend(index, connect.identifier)
                return index
            } catch {
                guard error.code == EBUSY, !deadline.passed else { throw error }
                pause(interval)
                interval = min(interval * 2, Self.retryIntervals.most)
            }
        }
    }

    private func index(
        of connect: KernelConnect, _ answers: [GenericMessage]
    ) throws(KernelDeviceError) -> UInt32 {
        if let answer = answers.first(where: { $0.command == KernelNBD.NBD_CMD_CONNECT }) {
            do throws(NetlinkFormatError) {
                return try answer.index(of: KernelNBD.NBD_CMD_CONNECT)
            } catch { throw KernelDeviceError(code: EPROTO, "connect: \(error)") }
        }
        // The kernel leaves the answer out when it has no memory for it; the device is there all the same.
        if let index = connect.index { return index }
        if let identifier = DeviceIdentifier(connect.identifier) {
            do throws(SystemError) {
                if let device = try KernelDevice.find(identifier, root: root) { return device.index }
            } catch { throw KernelDeviceError(error) }
        }
        throw KernelDeviceError(code: EPROTO, "the kernel connected a device and did not say which")
    }

    private func checkBackend(_ index: UInt32, _ identifier: String) throws(KernelDeviceError) {
        let device = KernelDevice(index: index, root: root)
        var unknown: SystemError?
        do throws(SystemError) {
            if try device.backend == identifier { return }
        } catch { unknown = error }
        // The kernel said that it is the one just made.
        _ = try perform(.disconnect(index: index), "disconnect \(device.path)")
        if let unknown { throw KernelDeviceError(unknown) }
        throw KernelDeviceError(
            code: EOPNOTSUPP,
            "this kernel (\(kernelRelease())) does not remember whose a device is (\(device.folder)/backend is missing),"
                + " and a restarted daemon could not find its devices: Linux 5.14 or newer is needed")
    }

    /// Gives a device new connections for dead ones, or another size. Sockets for which no connection was dead are
    /// closed by the kernel, which the other end sees as end of stream.
    ///
    /// With a size this waits inside the kernel for all I/O in flight: only while that I/O can complete.
    package func reconfigure(_ reconfigure: KernelReconfigure) throws(KernelDeviceError) {
        let device = KernelDevice(index: reconfigure.index, root: root)
        try check(device, reconfigure.identifier)
        _ = try perform(reconfigure.message, "reconfigure \(device.path)")
    }

    /// Ends a device: requests in flight fail. Returns before the device is free; see `waitUntilFree`.
    ///
    /// The kernel says goodbye on every connection and waits until there is room for it, so the other ends must be
    /// read, or shut down, meanwhile.
    /// - Parameter identifier: what the device's `backend` must be, so that a device of somebody else is not touched.
    package func disconnect(index: UInt32, identifier: String) throws(KernelDeviceError) {
        let device = KernelDevice(index: index, root: root)
        try check(device, identifier)
        _ = try perform(.disconnect(index: index), "disconnect \(device.path)")
    }

    private func check(_ device: KernelDevice, _ identifier: String) throws(KernelDeviceError) {
        let backend: String?
        do throws(SystemError) { backend = try device.backend } catch { throw KernelDeviceError(error) }
        if backend == identifier { return }
        let found = backend.map { "its backend is '\($0)'" } ?? "it is not connected, or not with a backend"
        throw KernelDeviceError(code: ENODEV, "\(device.path) is not ours to change: \(found), not '\(identifier)'")
    }

    /// All devices the driver has.
    package func status() throws(KernelDeviceError) -> [KernelDeviceStatus] {
        let answers = try perform(.status(index: nil), "list nbd devices")
        guard let answer = answers.first else { throw KernelDeviceError(code: EPROTO, "the kernel lists no devices") }
        do throws(NetlinkFormatError) {
            return try answer.statusList()
        } catch { throw KernelDeviceError(code: EPROTO, "list nbd devices: \(error)") }
    }

    /// The driver as generic netlink knows it. ENODEV when it does not: the kernel has tried to load the module then.
    package func family() throws(KernelDeviceError) -> GenericFamily {
        var socket = try open()
        return try Self.family(KernelNBD.NBD_GENL_FAMILY_NAME, &socket)
    }

    // MARK: Requests

    /// Asks for the family each time: its number is another one after the module was loaded again.
    private func perform(
        _ message: GenericMessage, _ operation: String
    ) throws(KernelDeviceError) -> [GenericMessage] {
        var socket = try open()
        let family = try Self.family(KernelNBD.NBD_GENL_FAMILY_NAME, &socket)
        do throws(KernelDeviceError) {
            return try socket.request(message, type: family.id, operation)
        } catch {
            guard error.code == EPERM else { throw error }
            throw KernelDeviceError(
                code: EPERM,
                "\(operation): not permitted: the daemon needs CAP_SYS_ADMIN of the host (run it as root; a container"
                    + " must be privileged and have no user namespace)")
        }
    }

    private func open() throws(KernelDeviceError) -> NetlinkSocket {
        do throws(SystemError) {
            return try NetlinkSocket(receiveTimeout: Self.answerTimeout)
        } catch { throw KernelDeviceError(error) }
    }

    static func family(
        _ name: String, _ socket: inout NetlinkSocket
    ) throws(KernelDeviceError) -> GenericFamily {
        let answers: [GenericMessage]
        do throws(KernelDeviceError) {
            answers = try socket.request(
                GenericNetlink.getFamily(name), type: GenericNetlink.GENL_ID_CTRL, "look for netlink family \(name)")
        } catch {
            guard error.code == ENOENT else { throw error }
            throw KernelDeviceError(
                code: ENODEV,
                "this kernel (\(kernelRelease())) has no \(name) driver: it knows no netlink family '\(name)'")
        }
        guard let answer = answers.first else {
            throw KernelDeviceError(code: EPROTO, "the kernel does not describe netlink family \(name)")
        }
        do throws(NetlinkFormatError) {
            return try GenericFamily(answer)
        } catch { throw KernelDeviceError(code: EPROTO, "netlink family \(name): \(error)") }
    }
}

/// `uname -r`.
func kernelRelease() -> String {
    var name = utsname()
    uname(&name)
    return withUnsafeBytes(of: &name.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}

/// A moment of CLOCK_MONOTONIC.
package struct Deadline: Sendable {
    private let time: UInt64

    package init(seconds: Double) { time = monotonicNanoseconds() &+ UInt64(max(seconds, 0) * 1e9) }

    package var passed: Bool { monotonicNanoseconds() >= time }

    /// Milliseconds left, rounded up, for poll.
    var milliseconds: Int32 {
        let now = monotonicNanoseconds()
        guard now < time else { return 0 }
        return Int32(clamping: (time - now + 999_999) / 1_000_000)
    }

    /// Asks for a condition in short steps until it holds; false when the deadline passed before. For what the kernel
    /// tells nobody about, such as the files of sysfs.
    func poll<Failure: Error>(
        every interval: UInt64 = 5_000_000, _ condition: () throws(Failure) -> Bool
    ) throws(Failure) -> Bool {
        while true {
            if try condition() { return true }
            if passed { return try condition() }
            pause(interval)
        }
    }
}

/// Waits, for `Deadline.poll` and tries of the same call.
func pause(_ nanoseconds: UInt64) {
    let deadline = monotonicNanoseconds() &+ nanoseconds
    var time = timespec(tv_sec: Int(deadline / 1_000_000_000), tv_nsec: Int(deadline % 1_000_000_000))
    while clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nil) == EINTR {}
}
