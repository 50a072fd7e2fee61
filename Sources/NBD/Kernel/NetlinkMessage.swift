/// Numbers of linux/netlink.h, under their C names.
package enum Netlink {
    package static let NETLINK_KOBJECT_UEVENT: Int32 = 15
    package static let NETLINK_GENERIC: Int32 = 16

    package static let NLM_F_REQUEST: UInt16 = 0x01
    package static let NLM_F_ACK: UInt16 = 0x04
    package static let NLM_F_CAPPED: UInt16 = 0x100
    package static let NLM_F_ACK_TLVS: UInt16 = 0x200

    package static let NLMSG_NOOP: UInt16 = 1
    package static let NLMSG_ERROR: UInt16 = 2
    package static let NLMSG_DONE: UInt16 = 3
    package static let NLMSG_OVERRUN: UInt16 = 4

    package static let NLMSGERR_ATTR_MSG: UInt16 = 1

    package static let SOL_NETLINK: Int32 = 270
    package static let NETLINK_ADD_MEMBERSHIP: Int32 = 1
    package static let NETLINK_CAP_ACK: Int32 = 10
    package static let NETLINK_EXT_ACK: Int32 = 11

    package static let NLA_F_NESTED: UInt16 = 1 << 15
    package static let NLA_TYPE_MASK: UInt16 = 0x3fff

    /// NLMSG_ALIGN and NLA_ALIGN: messages and attributes begin at multiples of 4 bytes.
    static func align(_ length: Int) -> Int { (length + 3) & ~3 }
}

/// Bytes that are not what their netlink headers promise.
package enum NetlinkFormatError: Error, Equatable, CustomStringConvertible {
    /// The named field ends behind the bytes that are there.
    case truncated(String)
    /// The named field has a value that cannot be.
    case invalid(String)

    package var description: String {
        switch self {
        case .truncated(let field): "truncated netlink message: \(field)"
        case .invalid(let field): "invalid netlink message: \(field)"
        }
    }
}

/// One netlink message: `struct nlmsghdr` and what follows it. All fields have the host's byte order.
package struct NetlinkMessage: Equatable, Sendable {
    package static let headerSize = 16

    package var type: UInt16
    package var flags: UInt16
    package var sequence: UInt32
    /// The sender's or receiver's netlink address; 0 is the kernel.
    package var port: UInt32
    package var payload: [UInt8]

    package init(type: UInt16, flags: UInt16, sequence: UInt32, port: UInt32 = 0, payload: [UInt8]) {
        self.type = type
        self.flags = flags
        self.sequence = sequence
        self.port = port
        self.payload = payload
    }

    package func encoded() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(Self.headerSize + payload.count)
        bytes.append(host: UInt32(Self.headerSize + payload.count))
        bytes.append(host: type)
        bytes.append(host: flags)
        bytes.append(host: sequence)
        bytes.append(host: port)
        bytes += payload
        return bytes
    }

    /// The messages of one datagram, in their order.
    package static func decode(_ datagram: [UInt8]) throws(NetlinkFormatError) -> [NetlinkMessage] {
        var messages: [NetlinkMessage] = []
        var rest = datagram[...]
        while !rest.isEmpty {
            var reader = HostReader(rest)
            let length = try Int(reader.integer("nlmsg_len", as: UInt32.self))
            guard length >= headerSize else { throw .invalid("nlmsg_len \(length)") }
            guard length <= rest.count else { throw .truncated("nlmsg_len \(length) of \(rest.count)") }
            let message = NetlinkMessage(
                type: try reader.integer("nlmsg_type"), flags: try reader.integer("nlmsg_flags"),
                sequence: try reader.integer("nlmsg_seq"), port: try reader.integer("nlmsg_pid"),
                payload: Array(rest.prefix(length).dropFirst(headerSize)))
            messages.append(message)
            rest = rest.dropFirst(Netlink.align(length))
        }
        return messages
    }
}

/// The kernel's word on a request: the payload of NLMSG_ERROR, `struct nlmsgerr`.
package struct NetlinkAcknowledgement: Equatable, Sendable {
    /// 0 for success, else an errno, positive.
    package var code: Int32
    /// What the kernel says about it (NLMSGERR_ATTR_MSG).
    package var text: String?

    package init(_ message: NetlinkMessage) throws(NetlinkFormatError) {
        var reader = HostReader(message.payload[...])
        let error: Int32 = try reader.integer("nlmsgerr.error")
        guard error <= 0, error > -4096 else { throw .invalid("nlmsgerr.error \(error)") }
        code = -error
        guard message.flags & Netlink.NLM_F_ACK_TLVS != 0 else { return }
        let echoed = try Int(reader.integer("nlmsgerr.msg.nlmsg_len", as: UInt32.self))
        try reader.skip(NetlinkMessage.headerSize - 4, "nlmsgerr.msg")
        if message.flags & Netlink.NLM_F_CAPPED == 0 {
            guard echoed >= NetlinkMessage.headerSize else { throw .invalid("nlmsgerr.msg.nlmsg_len \(echoed)") }
            try reader.skip(Netlink.align(echoed) - NetlinkMessage.headerSize, "nlmsgerr.msg payload")
        }
        for attribute in try NetlinkAttribute.decode(reader.bytes) where attribute.type == Netlink.NLMSGERR_ATTR_MSG {
            text = attribute.string
        }
    }
}

/// Reads fields in the host's byte order from the front of some bytes.
struct HostReader {
    private(set) var bytes: ArraySlice<UInt8>

    init(_ bytes: ArraySlice<UInt8>) { self.bytes = bytes }

    mutating func integer<Value: FixedWidthInteger>(
        _ field: String, as type: Value.Type = Value.self
    ) throws(NetlinkFormatError) -> Value {
        guard bytes.count >= MemoryLayout<Value>.size else { throw .truncated(field) }
        let value = bytes.withUnsafeBytes { $0.loadUnaligned(as: Value.self) }
        bytes = bytes.dropFirst(MemoryLayout<Value>.size)
        return value
    }

    mutating func skip(_ count: Int, _ field: String) throws(NetlinkFormatError) {
        guard bytes.count >= count else { throw .truncated(field) }
        bytes = bytes.dropFirst(count)
    }
}

extension [UInt8] {
    mutating func append<Value: FixedWidthInteger>(host value: Value) {
        Swift.withUnsafeBytes(of: value) { append(contentsOf: $0) }
    }
}
