import CLinux
import EventLoop
import Glibc

/// A netlink socket that talks to the kernel alone. Not shared between threads.
struct NetlinkSocket: ~Copyable {
    /// An attribute's length has 16 bits, and no answer we ask for holds two long ones.
    static let capacity = 128 << 10

    let descriptor: Int32
    private let waits: Bool
    private var sequence: UInt32 = 0

    /// - Parameters:
    ///   - protocol: NETLINK_*.
    ///   - receiveTimeout: seconds; nil for a socket that does not wait.
    init(protocol: Int32 = Netlink.NETLINK_GENERIC, receiveTimeout: Int?) throws(SystemError) {
        waits = receiveTimeout != nil
        descriptor = try Self.open(`protocol`, receiveTimeout)
    }

    deinit { Glibc.close(descriptor) }

    private static func open(_ number: Int32, _ receiveTimeout: Int?) throws(SystemError) -> Int32 {
        let flags = receiveTimeout == nil ? Int32(SOCK_NONBLOCK.rawValue) : 0
        let descriptor = try retrying("open netlink socket \(number)") {
            socket(AF_NETLINK, Int32(SOCK_RAW.rawValue | SOCK_CLOEXEC.rawValue) | flags, number)
        }
        if let receiveTimeout {
            var timeout = timeval(tv_sec: receiveTimeout, tv_usec: 0)
            setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &timeout, socklen_t(MemoryLayout<timeval>.size))
        }
        // Both only make errors easier to read; kernels before 4.12 do not know the second.
        set(descriptor, Netlink.NETLINK_CAP_ACK, 1)
        set(descriptor, Netlink.NETLINK_EXT_ACK, 1)
        // A socket connected to the kernel takes messages from nobody else.
        var kernel = sockaddr_nl()
        kernel.nl_family = sa_family_t(AF_NETLINK)
        do {
            try retrying("connect to netlink \(number)") {
                withUnsafePointer(to: &kernel) { pointer in
                    pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                        connect(
                            descriptor, __CONST_SOCKADDR_ARG(__sockaddr__: address),
                            socklen_t(MemoryLayout<sockaddr_nl>.size))
                    }
                }
            }
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        return descriptor
    }

    @discardableResult
    private static func set(_ descriptor: Int32, _ option: Int32, _ value: UInt32) -> Bool {
        var value = value
        return setsockopt(descriptor, Netlink.SOL_NETLINK, option, &value, socklen_t(MemoryLayout<UInt32>.size)) == 0
    }

    /// Receives a multicast group's messages from now on.
    func join(group: UInt32) throws(SystemError) {
        guard Self.set(descriptor, Netlink.NETLINK_ADD_MEMBERSHIP, group) else {
            throw SystemError(code: errno, operation: "join netlink group \(group)")
        }
    }

    /// Sends a request and collects what the kernel answers, up to its acknowledgement. The kernel carries the request
    /// out inside this call.
    /// - Parameters:
    ///   - type: the family's id.
    ///   - operation: for errors.
    mutating func request(
        _ message: GenericMessage, type: UInt16, _ operation: String
    ) throws(KernelDeviceError) -> [GenericMessage] {
        sequence &+= 1
        let bytes = message.request(type: type, sequence: sequence).encoded()
        var answers: [GenericMessage] = []
        do throws(SystemError) {
            try retrying("\(operation): send") { send(descriptor, bytes, bytes.count, 0) }
            while true {
                let datagram = try receive(operation)
                let acknowledgement: NetlinkAcknowledgement?
                do throws(NetlinkFormatError) {
                    acknowledgement = try sort(datagram, type: type, into: &answers)
                } catch { throw SystemError(code: EPROTO, operation: "\(operation): \(error)") }
                guard let acknowledgement else { continue }
                guard acknowledgement.code != 0 else { return answers }
                let text = acknowledgement.text.map { " (\($0))" } ?? ""
                throw SystemError(code: acknowledgement.code, operation: operation + text)
            }
        } catch { throw KernelDeviceError(error) }
    }

    /// Puts the answers to the current request aside; returns its acknowledgement when it is among the messages. What
    /// has another number answers an earlier request, which had timed out.
    private func sort(
        _ datagram: [UInt8], type: UInt16, into answers: inout [GenericMessage]
    ) throws(NetlinkFormatError) -> NetlinkAcknowledgement? {
        for message in try NetlinkMessage.decode(datagram) where message.sequence == sequence {
            if message.type == Netlink.NLMSG_ERROR { return try NetlinkAcknowledgement(message) }
            if message.type == type { answers.append(try GenericMessage(message)) }
        }
        return nil
    }

    /// One datagram. EAGAIN when there is none on a socket that does not wait; ETIMEDOUT on one that does.
    func receive(_ operation: String) throws(SystemError) -> [UInt8] {
        var failure: Int32 = 0
        let datagram = [UInt8](unsafeUninitializedCapacity: Self.capacity) { buffer, count in
            var received: Int
            repeat {
                received = recv(descriptor, buffer.baseAddress, buffer.count, 0)
            } while received < 0 && errno == EINTR
            failure = received < 0 ? errno : 0
            count = max(received, 0)
        }
        if failure == EAGAIN, waits { failure = ETIMEDOUT }
        guard failure == 0 else { throw SystemError(code: failure, operation: "\(operation): no answer") }
        return datagram
    }
}
