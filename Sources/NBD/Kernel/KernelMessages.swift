/// Numbers of linux/nbd-netlink.h, under their C names.
package enum KernelNBD {
    package static let NBD_GENL_FAMILY_NAME = "nbd"
    package static let NBD_GENL_VERSION: UInt8 = 1

    package static let NBD_CMD_CONNECT: UInt8 = 1
    package static let NBD_CMD_DISCONNECT: UInt8 = 2
    package static let NBD_CMD_RECONFIGURE: UInt8 = 3
    package static let NBD_CMD_STATUS: UInt8 = 5

    package static let NBD_ATTR_INDEX: UInt16 = 1
    package static let NBD_ATTR_SIZE_BYTES: UInt16 = 2
    package static let NBD_ATTR_BLOCK_SIZE_BYTES: UInt16 = 3
    package static let NBD_ATTR_TIMEOUT: UInt16 = 4
    package static let NBD_ATTR_SERVER_FLAGS: UInt16 = 5
    package static let NBD_ATTR_CLIENT_FLAGS: UInt16 = 6
    package static let NBD_ATTR_SOCKETS: UInt16 = 7
    package static let NBD_ATTR_DEAD_CONN_TIMEOUT: UInt16 = 8
    package static let NBD_ATTR_DEVICE_LIST: UInt16 = 9
    package static let NBD_ATTR_BACKEND_IDENTIFIER: UInt16 = 10

    package static let NBD_SOCK_ITEM: UInt16 = 1
    package static let NBD_SOCK_FD: UInt16 = 1

    package static let NBD_DEVICE_ITEM: UInt16 = 1
    package static let NBD_DEVICE_INDEX: UInt16 = 1
    package static let NBD_DEVICE_CONNECTED: UInt16 = 2
}

/// What the kernel is to make a device of.
package struct KernelConnect: Equatable, Sendable {
    /// The X of /dev/nbdX; nil lets the kernel choose a free one.
    package var index: UInt32?
    /// The kernel's ends of connected stream sockets, one hardware queue each.
    package var sockets: [Int32]
    /// Bytes.
    package var size: UInt64
    /// Bytes, 512...4096. The kernel takes it for both the logical and the physical block size.
    package var blockSize: UInt32
    /// NBD_FLAG_* of the export.
    package var serverFlags: UInt16
    /// Seconds that requests wait for new connections when all have died; 0 fails them at once.
    package var deadConnectionTimeout: UInt64
    /// What sysfs shows as `backend`, and every reconfigure must repeat.
    package var identifier: String

    package init(
        index: UInt32?, sockets: [Int32], size: UInt64, blockSize: UInt32, serverFlags: UInt16,
        deadConnectionTimeout: UInt64, identifier: String
    ) {
        self.index = index
        self.sockets = sockets
        self.size = size
        self.blockSize = blockSize
        self.serverFlags = serverFlags
        self.deadConnectionTimeout = deadConnectionTimeout
        self.identifier = identifier
    }

    package var message: GenericMessage {
        var attributes = NetlinkAttributes()
        if let index { attributes.add(KernelNBD.NBD_ATTR_INDEX, index) }
        attributes.add(KernelNBD.NBD_ATTR_SIZE_BYTES, size)
        attributes.add(KernelNBD.NBD_ATTR_BLOCK_SIZE_BYTES, UInt64(blockSize))
        // 0: the kernel never ends a connection because one request takes long.
        attributes.add(KernelNBD.NBD_ATTR_TIMEOUT, UInt64(0))
        attributes.add(KernelNBD.NBD_ATTR_SERVER_FLAGS, UInt64(serverFlags))
        attributes.add(KernelNBD.NBD_ATTR_CLIENT_FLAGS, UInt64(0))
        attributes.add(KernelNBD.NBD_ATTR_DEAD_CONN_TIMEOUT, deadConnectionTimeout)
        attributes.add(sockets: sockets)
        attributes.add(KernelNBD.NBD_ATTR_BACKEND_IDENTIFIER, identifier)
        return GenericMessage(command: KernelNBD.NBD_CMD_CONNECT, attributes)
    }
}

/// What is to become different of a connected device; nil and empty leave a thing as it is.
package struct KernelReconfigure: Equatable, Sendable {
    package var index: UInt32
    /// Each replaces one dead connection; when none is dead the kernel closes it and says nothing.
    package var sockets: [Int32] = []
    /// Bytes. A new size waits inside the call for all I/O in flight.
    package var size: UInt64?
    /// Seconds.
    package var deadConnectionTimeout: UInt64?
    package var identifier: String

    package init(index: UInt32, identifier: String) {
        self.index = index
        self.identifier = identifier
    }

    /// Without NBD_ATTR_TIMEOUT: the kernel would set the queue's request timer back to 30 s with it.
    package var message: GenericMessage {
        var attributes = NetlinkAttributes()
        attributes.add(KernelNBD.NBD_ATTR_INDEX, index)
        if let size { attributes.add(KernelNBD.NBD_ATTR_SIZE_BYTES, size) }
        if let deadConnectionTimeout {
            attributes.add(KernelNBD.NBD_ATTR_DEAD_CONN_TIMEOUT, deadConnectionTimeout)
        }
        if !sockets.isEmpty { attributes.add(sockets: sockets) }
        attributes.add(KernelNBD.NBD_ATTR_BACKEND_IDENTIFIER, identifier)
        return GenericMessage(command: KernelNBD.NBD_CMD_RECONFIGURE, attributes)
    }
}

/// A device in the kernel's list.
package struct KernelDeviceStatus: Equatable, Sendable {
    package var index: UInt32
    /// Connected, or just opened by somebody: the kernel does not tell these apart.
    package var inUse: Bool
}

extension GenericMessage {
    fileprivate init(command: UInt8, _ attributes: NetlinkAttributes) {
        self.init(command: command, version: KernelNBD.NBD_GENL_VERSION, attributes: attributes.bytes)
    }

    package static func disconnect(index: UInt32) -> GenericMessage {
        var attributes = NetlinkAttributes()
        attributes.add(KernelNBD.NBD_ATTR_INDEX, index)
        return GenericMessage(command: KernelNBD.NBD_CMD_DISCONNECT, attributes)
    }

    /// - Parameter index: nil asks for all devices.
    package static func status(index: UInt32?) -> GenericMessage {
        var attributes = NetlinkAttributes()
        if let index { attributes.add(KernelNBD.NBD_ATTR_INDEX, index) }
        return GenericMessage(command: KernelNBD.NBD_CMD_STATUS, attributes)
    }

    /// The index in the answer to CONNECT.
    package func index(of command: UInt8) throws(NetlinkFormatError) -> UInt32 {
        guard self.command == command else { throw .invalid("nbd command \(self.command)") }
        guard let index = try decoded().last(KernelNBD.NBD_ATTR_INDEX) else { throw .truncated("NBD_ATTR_INDEX") }
        return try index.integer("NBD_ATTR_INDEX")
    }

    /// The devices in the answer to STATUS.
    package func statusList() throws(NetlinkFormatError) -> [KernelDeviceStatus] {
        guard command == KernelNBD.NBD_CMD_STATUS else { throw .invalid("nbd command \(command)") }
        guard let list = try decoded().last(KernelNBD.NBD_ATTR_DEVICE_LIST) else {
            throw .truncated("NBD_ATTR_DEVICE_LIST")
        }
        var devices: [KernelDeviceStatus] = []
        for item in try list.nested() where item.type == KernelNBD.NBD_DEVICE_ITEM {
            let fields = try item.nested()
            guard let index = fields.last(KernelNBD.NBD_DEVICE_INDEX),
                let connected = fields.last(KernelNBD.NBD_DEVICE_CONNECTED)
            else { throw .truncated("NBD_DEVICE_ITEM") }
            devices.append(
                KernelDeviceStatus(
                    index: try index.integer("NBD_DEVICE_INDEX"),
                    inUse: try connected.integer("NBD_DEVICE_CONNECTED", as: UInt8.self) != 0))
        }
        return devices
    }
}

extension NetlinkAttributes {
    fileprivate mutating func add(sockets: [Int32]) {
        nest(KernelNBD.NBD_ATTR_SOCKETS) { list in
            for socket in sockets {
                list.nest(KernelNBD.NBD_SOCK_ITEM) { $0.add(KernelNBD.NBD_SOCK_FD, socket) }
            }
        }
    }
}
