/// Numbers of a PureFlash store's data connection. Their source is a running cluster (its AIO engine); all fields are
/// little-endian and packed.
package enum StoreProtocol {
    /// TCP port of a store's data connections.
    package static let port: UInt16 = 49162
    /// TCP port on which a conductor tells stores things, over HTTP.
    package static let httpPort: UInt16 = 49181
    package static let version: Int16 = 1
    /// Commands in flight on a connection, at most.
    package static let maximumDepth = 255
    /// Bytes of one command's payload, at most. A store does not check it and overruns its buffers.
    package static let maximumTransfer: UInt32 = 128 << 10
    /// Bytes: offsets and lengths are multiples of it. A store takes anything else for a broken disk.
    package static let sector: UInt32 = 512
    /// Bytes. A command that crosses a multiple of it lands in another volume's data.
    package static let objectSize: UInt64 = 64 << 20
    /// Bytes of one shard; the last of a volume may be shorter.
    package static let shardSize: UInt64 = 64 << 30
    /// Bytes: a replica's id leaves 20 bits for the index of its shard.
    package static let maximumVolume = shardSize << 20
    /// `snapshot` of the volume itself.
    package static let head = UInt32.max
    /// Volume ids are multiples of it.
    package static let volumeIDUnit: UInt64 = 1 << 24
}

/// The first message on a connection, each way.
package struct StoreHandshake: Equatable, Sendable {
    /// Bytes on the wire.
    package static let size = 32
    /// `result` when the depth or the volume is refused.
    package static let refused: Int16 = 22

    /// Seconds; a client sends 0.
    package var timeout: Int16 = 0
    /// Commands in flight: asked for, or granted.
    package var depth: Int16
    package var volumeID: UInt64
    /// The protocol's version from a client; from a server 0 for success, or `refused`.
    package var result: Int16

    package init(depth: Int16, volumeID: UInt64, result: Int16 = StoreProtocol.version) {
        self.depth = depth
        self.volumeID = volumeID
        self.result = result
    }

    /// - Parameter bytes: `size` bytes of any alignment.
    package init(decoding bytes: UnsafeRawPointer) {
        timeout = bytes.load(littleEndian: Int16.self, at: 0)
        depth = bytes.load(littleEndian: Int16.self, at: 2)
        volumeID = bytes.load(littleEndian: UInt64.self, at: 8)
        result = bytes.load(littleEndian: Int16.self, at: 20)
    }

    /// - Parameter bytes: room for `size` bytes.
    package func encode(to bytes: UnsafeMutableRawPointer) {
        bytes.initializeMemory(as: UInt8.self, repeating: 0, count: Self.size)
        bytes.store(littleEndian: timeout, at: 0)
        bytes.store(littleEndian: depth, at: 2)
        bytes.store(littleEndian: volumeID, at: 8)
        bytes.store(littleEndian: result, at: 20)
    }
}

/// What a client asks of a store.
package struct StoreCommand: Equatable, Sendable {
    /// Bytes on the wire, without the payload of a write.
    package static let size = 64

    /// Any other number makes a store exit.
    package enum Opcode: UInt8, Sendable {
        case write = 1
        case read = 2
    }

    /// As received; `Opcode` names those that exist.
    package var opcode: UInt8
    /// Comes back in the reply.
    package var id: UInt16
    /// The number of a snapshot, or `StoreProtocol.head`.
    package var snapshot: UInt32 = StoreProtocol.head
    package var volumeID: UInt64
    /// Where the client's buffer is; for RDMA alone.
    package var address: UInt64 = 0
    /// The buffer's key; for RDMA alone.
    package var key: UInt32 = 0
    /// The version of the volume's layout that the client knows.
    package var metaVersion: UInt16
    /// Bytes from the start of the volume.
    package var offset: UInt64
    /// Bytes.
    package var length: UInt32
    /// 0 at first, one more with each time it is sent again; comes back in the reply.
    package var sequence: UInt32

    package init(
        _ opcode: Opcode, id: UInt16, volumeID: UInt64, metaVersion: UInt16, offset: UInt64, length: UInt32,
        sequence: UInt32 = 0, snapshot: UInt32 = StoreProtocol.head
    ) {
        self.opcode = opcode.rawValue
        self.id = id
        self.snapshot = snapshot
        self.volumeID = volumeID
        self.metaVersion = metaVersion
        self.offset = offset
        self.length = length
        self.sequence = sequence
    }

    /// - Parameter bytes: `size` bytes of any alignment.
    @inline(__always)
    package init(decoding bytes: UnsafeRawPointer) {
        opcode = bytes.load(littleEndian: UInt8.self, at: 0)
        id = bytes.load(littleEndian: UInt16.self, at: 2)
        snapshot = bytes.load(littleEndian: UInt32.self, at: 4)
        volumeID = bytes.load(littleEndian: UInt64.self, at: 8)
        address = bytes.load(littleEndian: UInt64.self, at: 16)
        key = bytes.load(littleEndian: UInt32.self, at: 24)
        metaVersion = bytes.load(littleEndian: UInt16.self, at: 28)
        offset = bytes.load(littleEndian: UInt64.self, at: 32)
        length = bytes.load(littleEndian: UInt32.self, at: 40)
        sequence = bytes.load(littleEndian: UInt32.self, at: 44)
    }

    /// - Parameter bytes: room for `size` bytes.
    @inline(__always)
    package func encode(to bytes: UnsafeMutableRawPointer) {
        bytes.initializeMemory(as: UInt64.self, repeating: 0, count: Self.size / 8)
        bytes.store(littleEndian: opcode, at: 0)
        bytes.store(littleEndian: id, at: 2)
        bytes.store(littleEndian: snapshot, at: 4)
        bytes.store(littleEndian: volumeID, at: 8)
        bytes.store(littleEndian: address, at: 16)
        bytes.store(littleEndian: key, at: 24)
        bytes.store(littleEndian: metaVersion, at: 28)
        bytes.store(littleEndian: offset, at: 32)
        bytes.store(littleEndian: length, at: 40)
        bytes.store(littleEndian: sequence, at: 44)
    }
}

/// A store's answer to a command. The data of a read follows it, and only when its status is 0. A store may leave
/// anything in the bytes that have no meaning.
package struct StoreReply: Equatable, Sendable {
    /// Bytes on the wire, without the data of a read.
    package static let size = 32

    package var status: StoreStatus
    /// The store's, in an answer that asks for the volume to be opened again; 0 in others.
    package var metaVersion: UInt16
    /// The command's.
    package var id: UInt16
    /// The command's.
    package var sequence: UInt32
    package var block: UInt32 = 0

    package init(status: StoreStatus, metaVersion: UInt16 = 0, id: UInt16, sequence: UInt32) {
        self.status = status
        self.metaVersion = metaVersion
        self.id = id
        self.sequence = sequence
    }

    /// - Parameter bytes: `size` bytes of any alignment.
    @inline(__always)
    package init(decoding bytes: UnsafeRawPointer) {
        status = StoreStatus(rawValue: bytes.load(littleEndian: UInt16.self, at: 0))
        metaVersion = bytes.load(littleEndian: UInt16.self, at: 2)
        id = bytes.load(littleEndian: UInt16.self, at: 4)
        sequence = bytes.load(littleEndian: UInt32.self, at: 8)
        block = bytes.load(littleEndian: UInt32.self, at: 12)
    }

    /// - Parameter bytes: room for `size` bytes.
    @inline(__always)
    package func encode(to bytes: UnsafeMutableRawPointer) {
        bytes.initializeMemory(as: UInt64.self, repeating: 0, count: Self.size / 8)
        bytes.store(littleEndian: status.rawValue, at: 0)
        bytes.store(littleEndian: metaVersion, at: 2)
        bytes.store(littleEndian: id, at: 4)
        bytes.store(littleEndian: sequence, at: 8)
        bytes.store(littleEndian: block, at: 12)
    }
}

/// How a command went: a code, and flags that say what the client has to do.
package struct StoreStatus: RawRepresentable, Equatable, Sendable, CustomStringConvertible {
    package let rawValue: UInt16

    package init(rawValue: UInt16) { self.rawValue = rawValue }

    package static let success = StoreStatus(rawValue: 0)
    package static let invalidOpcode = StoreStatus(rawValue: 0x01)
    package static let invalidField = StoreStatus(rawValue: 0x02)
    package static let invalidState = StoreStatus(rawValue: 0x09)
    package static let lbaRange = StoreStatus(rawValue: 0x80)
    package static let notPrimary = StoreStatus(rawValue: 0xC0)
    package static let noSpace = StoreStatus(rawValue: 0xC1)
    package static let readOnly = StoreStatus(rawValue: 0xC2)
    package static let ioError = StoreStatus(rawValue: 0xC4)

    private static let degradeFlag: UInt16 = 0x2000
    private static let reopenFlag: UInt16 = 0x4000

    /// Without its flags.
    package var code: StoreStatus { StoreStatus(rawValue: rawValue & ~(Self.degradeFlag | Self.reopenFlag)) }
    /// The volume has lost a replica.
    package var isDegraded: Bool { rawValue & Self.degradeFlag != 0 }
    /// The client's view of the volume is stale: open it again, then send the command again.
    package var asksToReopen: Bool { rawValue & Self.reopenFlag != 0 }
    /// The command was not done and may be later, there or at another store, when the volume was opened again: the
    /// store has lost its peers, its conductor, its memory or its role, not the data.
    package var mayPass: Bool {
        switch code.rawValue {
        case 0x05...0x07, 0x09, 0x82, 0xC0, 0xC3, 0xC5, 0xC7...0xC9, 0xCE, 0xCF: true
        default: asksToReopen
        }
    }
    package var withReopen: StoreStatus { StoreStatus(rawValue: rawValue | Self.reopenFlag) }

    private static let names: [UInt16: String] = [
        0x00: "SUCCESS", 0x01: "INVALID_OPCODE", 0x02: "INVALID_FIELD", 0x03: "CMDID_CONFLICT",
        0x04: "DATA_XFER_ERROR", 0x05: "POWER_LOSS", 0x06: "INTERNAL", 0x07: "ABORT_REQ",
        0x08: "INVALID_IO_TIMEOUT", 0x09: "INVALID_STATE", 0x80: "LBA_RANGE", 0x82: "NS_NOT_READY",
        0xC0: "NOT_PRIMARY", 0xC1: "NOSPACE", 0xC2: "READONLY", 0xC3: "CONN_LOST", 0xC4: "AIOERROR",
        0xC5: "ERROR_HANDLED", 0xC6: "ERROR_UNRECOVERABLE", 0xC7: "AIO_TIMEOUT", 0xC8: "REPLICATING_TIMEOUT",
        0xC9: "NODE_LOST", 0xCA: "LOGFAILED", 0xCB: "METRO_REPLICATING_FAILED", 0xCC: "RECOVERY_FAILED",
        0xCD: "SSD_ERROR", 0xCE: "REP_TO_PRIMARY", 0xCF: "NO_RESOURCE",
    ]

    /// The engine's own names, as in "NOT_PRIMARY, REOPEN".
    package var description: String {
        var words: [String] = []
        // Nothing was done then.
        if code != .success || !asksToReopen {
            words.append(Self.names[code.rawValue] ?? "status 0x" + String(code.rawValue, radix: 16))
        }
        if isDegraded { words.append("DEGRADE") }
        if asksToReopen { words.append("REOPEN") }
        return words.joined(separator: ", ")
    }
}

extension UnsafeMutableRawPointer {
    @inline(__always)
    fileprivate func store<Value: FixedWidthInteger>(littleEndian value: Value, at offset: Int) {
        storeBytes(of: value.littleEndian, toByteOffset: offset, as: Value.self)
    }
}

extension UnsafeRawPointer {
    @inline(__always)
    fileprivate func load<Value: FixedWidthInteger>(littleEndian type: Value.Type, at offset: Int) -> Value {
        Value(littleEndian: loadUnaligned(fromByteOffset: offset, as: type))
    }
}
