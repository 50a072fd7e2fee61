import CLinux
import EventLoop
import Glibc

/// What the kernel tells about a device as it comes, changes and goes (uevents), for an nbd disk or partition.
package struct KernelEvent: Equatable, Sendable {
    /// `add`, `change`, `remove`, ...
    package let action: String
    /// The X of /dev/nbdX.
    package let index: UInt32
    /// The Y of /dev/nbdXpY; nil for the disk.
    package let partition: UInt32?

    /// A datagram of the kernel: `action@path`, then fields, each ended by a zero. Nil for all other devices.
    package init?(_ datagram: [UInt8]) {
        let fields = datagram.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
        guard let at = fields.first?.firstIndex(of: "@"), fields.contains("SUBSYSTEM=block"),
            let name = fields.first(where: { $0.hasPrefix("DEVNAME=nbd") })?.dropFirst("DEVNAME=nbd".utf8.count)
        else { return nil }
        let numbers = name.split(separator: "p", omittingEmptySubsequences: false).map { UInt32($0) }
        guard (1...2).contains(numbers.count), let index = numbers[0] else { return nil }
        if numbers.count == 2, numbers[1] == nil { return nil }
        action = String(fields[0][..<at])
        self.index = index
        partition = numbers.count == 2 ? numbers[1] : nil
    }
}

/// Listens for partitions that come and go, so that they get their names also where no udev gives them. Lives on its
/// loop's thread.
package final class KernelEventWatcher: EventSource, @unchecked Sendable {
    /// The kernel's own messages; udev passes them on in another group.
    private static let kernelGroup: UInt32 = 1

    private let loop: EventLoop
    private let socket: NetlinkSocket
    private let handler: (KernelEvent?) -> Void
    private var token: EventLoop.Token?

    /// On the loop's thread.
    /// - Parameter handler: gets nil when the kernel had no room for more messages, so that anything may have happened.
    package init(loop: EventLoop, handler: @escaping (KernelEvent?) -> Void) throws(SystemError) {
        self.loop = loop
        self.handler = handler
        socket = try NetlinkSocket(protocol: Netlink.NETLINK_KOBJECT_UEVENT, receiveTimeout: nil)
        try socket.join(group: Self.kernelGroup)
        token = try loop.add(socket.descriptor, events: EPOLLIN.rawValue, source: self)
    }

    /// Stops listening; on the loop's thread.
    package func close() {
        if let token { loop.remove(token, descriptor: socket.descriptor) }
        token = nil
    }

    package func ready(events: UInt32) {
        while token != nil {
            do throws(SystemError) {
                if let event = KernelEvent(try socket.receive("listen for devices")) { handler(event) }
            } catch {
                if error.code == EAGAIN { return }
                handler(nil)
                if error.code != ENOBUFS { return }
            }
        }
    }
}
