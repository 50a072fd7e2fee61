import CLinux
import EventLoop
import Glibc

/// One message of the kernel about a device coming, changing or going (Documentation/ABI/stable/sysfs-uevent).
package struct KernelEvent: Equatable, Sendable {
    /// "add", "change", "remove", ...
    package let action: String
    /// The X of the nbd device it is about, whole or one of its partitions.
    package let index: UInt32

    /// - Parameter bytes: `action@path` and `KEY=value` strings, each ended by NUL.
    /// - Returns: nil for what is about something else, or no message of the kernel at all.
    package init?(_ bytes: some Collection<UInt8>) {
        var values: [Substring: Substring] = [:]
        for field in bytes.split(separator: 0) {
            guard let text = String(validating: field, as: UTF8.self) else { continue }
            let parts = text.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            if parts.count == 2 { values[parts[0]] = parts[1] }
        }
        guard let action = values["ACTION"], values["SUBSYSTEM"] == "block",
            let name = values["DEVNAME"], name.hasPrefix("nbd")
        else { return nil }
        let digits = name.dropFirst(3).prefix { $0.isASCII && $0.isNumber }
        let rest = name.dropFirst(3 + digits.count)
        guard let index = UInt32(digits), rest.isEmpty || rest.hasPrefix("p") && UInt32(rest.dropFirst()) != nil else {
            return nil
        }
        self.action = String(action)
        self.index = index
    }
}

/// Listens for what the kernel says of nbd devices: partitions that come and go while a device is mapped. Lives on its
/// loop's thread.
package final class KernelEventWatcher: EventSource, @unchecked Sendable {
    /// NETLINK_KOBJECT_UEVENT of linux/netlink.h, and its group of messages from the kernel itself.
    private static let family: Int32 = 15
    private static let kernelGroup: UInt32 = 1
    private static let messageSize = 8192

    private let loop: EventLoop
    private let descriptor: Int32
    private let handler: (KernelEvent) -> Void
    private var token: EventLoop.Token?

    /// On the loop's thread.
    package init(loop: EventLoop, handler: @escaping (KernelEvent) -> Void) throws(SystemError) {
        self.loop = loop
        self.handler = handler
        descriptor = try retrying("listen for device events") {
            socket(AF_NETLINK, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), Self.family)
        }
        var address = sockaddr_nl()
        address.nl_family = sa_family_t(AF_NETLINK)
        address.nl_groups = Self.kernelGroup
        let bound = withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(
                    descriptor, __CONST_SOCKADDR_ARG(__sockaddr__: $0), socklen_t(MemoryLayout<sockaddr_nl>.size))
            }
        }
        guard bound == 0 else {
            let code = errno
            Glibc.close(descriptor)
            throw SystemError(code: code, operation: "listen for device events")
        }
        do {
            token = try loop.add(descriptor, events: EPOLLIN.rawValue, source: self)
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    /// Stops listening; on the loop's thread.
    package func close() {
        if let token { loop.remove(token, descriptor: descriptor) }
        token = nil
        Glibc.close(descriptor)
    }

    package func ready(events: UInt32) {
        withUnsafeTemporaryAllocation(byteCount: Self.messageSize, alignment: 8) { buffer in
            while true {
                var sender = sockaddr_nl()
                var length = socklen_t(MemoryLayout<sockaddr_nl>.size)
                let count = withUnsafeMutablePointer(to: &sender) { pointer in
                    pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                        recvfrom(
                            descriptor, buffer.baseAddress, buffer.count, 0, __SOCKADDR_ARG(__sockaddr__: $0), &length)
                    }
                }
                // ENOBUFS, messages were lost, is told once and says nothing about those that follow.
                if count < 0, errno == EINTR || errno == ENOBUFS { continue }
                guard count > 0 else { return }
                // Processes may send to this group as well; only the kernel has no port.
                if sender.nl_pid == 0, let event = KernelEvent(buffer.prefix(count)) { handler(event) }
            }
        }
    }
}
