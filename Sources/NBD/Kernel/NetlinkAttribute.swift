/// One attribute, `struct nlattr` and its value.
package struct NetlinkAttribute: Equatable, Sendable {
    package static let headerSize = 4
    /// `nla_len` has 16 bits.
    package static let maximumValue = 0xffff - headerSize

    /// Without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
    package let type: UInt16
    package let value: ArraySlice<UInt8>

    /// The attributes that follow each other in `bytes`.
    package static func decode(_ bytes: ArraySlice<UInt8>) throws(NetlinkFormatError) -> [NetlinkAttribute] {
        var attributes: [NetlinkAttribute] = []
        var rest = bytes
        while !rest.isEmpty {
            var reader = HostReader(rest)
            let length = try Int(reader.integer("nla_len", as: UInt16.self))
            let type: UInt16 = try reader.integer("nla_type")
            guard length >= headerSize else { throw .invalid("nla_len \(length)") }
            guard length <= rest.count else { throw .truncated("nla_len \(length) of \(rest.count)") }
            attributes.append(
                NetlinkAttribute(type: type & Netlink.NLA_TYPE_MASK, value: rest.prefix(length).dropFirst(headerSize)))
            rest = rest.dropFirst(Netlink.align(length))
        }
        return attributes
    }

    /// The value as an integer of exactly this width.
    package func integer<Value: FixedWidthInteger>(
        _ name: String, as type: Value.Type = Value.self
    ) throws(NetlinkFormatError) -> Value {
        guard value.count == MemoryLayout<Value>.size else { throw .invalid("\(name) of \(value.count) bytes") }
        var reader = HostReader(value)
        return try reader.integer(name)
    }

    /// The value up to its terminating zero; bytes that are no UTF-8 are replaced.
    package var string: String { String(decoding: value.prefix { $0 != 0 }, as: UTF8.self) }

    package func nested() throws(NetlinkFormatError) -> [NetlinkAttribute] { try Self.decode(value) }
}

extension [NetlinkAttribute] {
    /// The last of a type, as the kernel reads it.
    package func last(_ type: UInt16) -> NetlinkAttribute? { last { $0.type == type } }
}

/// Attributes being written.
package struct NetlinkAttributes {
    package private(set) var bytes: [UInt8] = []

    package init() {}

    package mutating func add<Value: FixedWidthInteger>(_ type: UInt16, _ value: Value) {
        add(type) { $0.append(host: value) }
    }

    /// A string with its terminating zero.
    package mutating func add(_ type: UInt16, _ text: String) {
        add(type) { bytes in
            bytes += text.utf8
            bytes.append(0)
        }
    }

    package mutating func nest(_ type: UInt16, _ body: (inout NetlinkAttributes) -> Void) {
        var inner = NetlinkAttributes()
        body(&inner)
        add(type | Netlink.NLA_F_NESTED) { $0 += inner.bytes }
    }

    private mutating func add(_ type: UInt16, _ value: (inout [UInt8]) -> Void) {
        var content: [UInt8] = []
        value(&content)
        precondition(content.count <= NetlinkAttribute.maximumValue, "netlink attribute \(type) is too long")
        bytes.append(host: UInt16(NetlinkAttribute.headerSize + content.count))
        bytes.append(host: type)
        bytes += content
        bytes += [UInt8](repeating: 0, count: Netlink.align(content.count) - content.count)
    }
}
