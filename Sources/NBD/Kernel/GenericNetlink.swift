/// Numbers of linux/genetlink.h, under their C names.
package enum GenericNetlink {
    /// The controller's message type: the one family whose number is known.
    package static let GENL_ID_CTRL: UInt16 = 0x10

    package static let CTRL_CMD_NEWFAMILY: UInt8 = 1
    package static let CTRL_CMD_GETFAMILY: UInt8 = 3

    package static let CTRL_ATTR_FAMILY_ID: UInt16 = 1
    package static let CTRL_ATTR_FAMILY_NAME: UInt16 = 2
    package static let CTRL_ATTR_VERSION: UInt16 = 3

    /// Asks the controller for a family; the kernel loads its module when it can.
    package static func getFamily(_ name: String) -> GenericMessage {
        var attributes = NetlinkAttributes()
        attributes.add(CTRL_ATTR_FAMILY_NAME, name)
        return GenericMessage(command: CTRL_CMD_GETFAMILY, version: 1, attributes: attributes.bytes)
    }
}

/// The payload of a generic netlink message: `struct genlmsghdr` and attributes.
package struct GenericMessage: Equatable, Sendable {
    package static let headerSize = 4

    package var command: UInt8
    package var version: UInt8
    package var attributes: [UInt8]

    package init(command: UInt8, version: UInt8, attributes: [UInt8]) {
        self.command = command
        self.version = version
        self.attributes = attributes
    }

    package init(_ message: NetlinkMessage) throws(NetlinkFormatError) {
        guard message.payload.count >= Self.headerSize else { throw .truncated("genlmsghdr") }
        command = message.payload[0]
        version = message.payload[1]
        attributes = Array(message.payload.dropFirst(Self.headerSize))
    }

    /// A message to the kernel that is to be acknowledged.
    package func request(type: UInt16, sequence: UInt32) -> NetlinkMessage {
        NetlinkMessage(
            type: type, flags: Netlink.NLM_F_REQUEST | Netlink.NLM_F_ACK, sequence: sequence,
            payload: [command, version, 0, 0] + attributes)
    }

    package func decoded() throws(NetlinkFormatError) -> [NetlinkAttribute] {
        try NetlinkAttribute.decode(attributes[...])
    }
}

/// A family as the controller describes it (CTRL_CMD_NEWFAMILY).
package struct GenericFamily: Equatable, Sendable {
    package var name: String
    /// The type of its messages; differs from boot to boot and after its module was loaded again.
    package var id: UInt16
    package var version: UInt32

    package init(_ message: GenericMessage) throws(NetlinkFormatError) {
        guard message.command == GenericNetlink.CTRL_CMD_NEWFAMILY else {
            throw .invalid("controller command \(message.command)")
        }
        let attributes = try message.decoded()
        guard let name = attributes.last(GenericNetlink.CTRL_ATTR_FAMILY_NAME),
            let id = attributes.last(GenericNetlink.CTRL_ATTR_FAMILY_ID)
        else { throw .truncated("CTRL_ATTR_FAMILY_ID") }
        self.name = name.string
        self.id = try id.integer("CTRL_ATTR_FAMILY_ID")
        guard self.id >= GenericNetlink.GENL_ID_CTRL else { throw .invalid("CTRL_ATTR_FAMILY_ID \(self.id)") }
        version = try attributes.last(GenericNetlink.CTRL_ATTR_VERSION)?.integer("CTRL_ATTR_VERSION") ?? 0
    }
}
