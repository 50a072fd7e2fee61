/// Numbers of the NBD protocol document, under their C names.
package enum NBD {
    // "Fixed newstyle negotiation"
    package static let NBDMAGIC: UInt64 = 0x4e42_444d_4147_4943
    package static let IHAVEOPT: UInt64 = 0x4948_4156_454f_5054
    package static let REPLY_MAGIC: UInt64 = 0x0003_e889_0455_65a9
    package static let NBD_FLAG_FIXED_NEWSTYLE: UInt16 = 1
    package static let NBD_FLAG_NO_ZEROES: UInt16 = 2

    // "Option types"
    package static let NBD_OPT_EXPORT_NAME: UInt32 = 1
    package static let NBD_OPT_ABORT: UInt32 = 2
    package static let NBD_OPT_LIST: UInt32 = 3
    package static let NBD_OPT_INFO: UInt32 = 6
    package static let NBD_OPT_GO: UInt32 = 7
    package static let NBD_OPT_STRUCTURED_REPLY: UInt32 = 8
    package static let NBD_OPT_LIST_META_CONTEXT: UInt32 = 9
    package static let NBD_OPT_SET_META_CONTEXT: UInt32 = 10

    // "Option reply types"
    package static let NBD_REP_ACK: UInt32 = 1
    package static let NBD_REP_SERVER: UInt32 = 2
    package static let NBD_REP_INFO: UInt32 = 3
    package static let NBD_REP_META_CONTEXT: UInt32 = 4
    package static let NBD_REP_ERR_UNSUP: UInt32 = 0x8000_0001
    package static let NBD_REP_ERR_POLICY: UInt32 = 0x8000_0002
    package static let NBD_REP_ERR_INVALID: UInt32 = 0x8000_0003
    package static let NBD_REP_ERR_UNKNOWN: UInt32 = 0x8000_0006
    package static let NBD_REP_ERR_SHUTDOWN: UInt32 = 0x8000_0007
    package static let NBD_REP_ERR_TOO_BIG: UInt32 = 0x8000_0009

    package static let NBD_INFO_EXPORT: UInt16 = 0
    package static let NBD_INFO_NAME: UInt16 = 1
    package static let NBD_INFO_DESCRIPTION: UInt16 = 2
    package static let NBD_INFO_BLOCK_SIZE: UInt16 = 3

    // "Transmission flags"
    package static let NBD_FLAG_HAS_FLAGS: UInt16 = 1 << 0
    package static let NBD_FLAG_READ_ONLY: UInt16 = 1 << 1
    package static let NBD_FLAG_SEND_FLUSH: UInt16 = 1 << 2
    package static let NBD_FLAG_SEND_FUA: UInt16 = 1 << 3
    package static let NBD_FLAG_SEND_TRIM: UInt16 = 1 << 5
    package static let NBD_FLAG_SEND_WRITE_ZEROES: UInt16 = 1 << 6
    package static let NBD_FLAG_SEND_DF: UInt16 = 1 << 7
    package static let NBD_FLAG_CAN_MULTI_CONN: UInt16 = 1 << 8
    package static let NBD_FLAG_SEND_CACHE: UInt16 = 1 << 10
    package static let NBD_FLAG_SEND_FAST_ZERO: UInt16 = 1 << 11

    // "Request message", "Command flags", "Request types"
    package static let NBD_REQUEST_MAGIC: UInt32 = 0x2560_9513
    package static let NBD_CMD_FLAG_FUA: UInt16 = 1 << 0
    package static let NBD_CMD_FLAG_NO_HOLE: UInt16 = 1 << 1
    package static let NBD_CMD_FLAG_DF: UInt16 = 1 << 2
    package static let NBD_CMD_FLAG_REQ_ONE: UInt16 = 1 << 3
    package static let NBD_CMD_FLAG_FAST_ZERO: UInt16 = 1 << 4

    // "Simple reply message", "Structured reply chunk message"
    package static let NBD_SIMPLE_REPLY_MAGIC: UInt32 = 0x6744_6698
    package static let NBD_STRUCTURED_REPLY_MAGIC: UInt32 = 0x668e_33ef
    package static let NBD_REPLY_FLAG_DONE: UInt16 = 1
    package static let NBD_REPLY_TYPE_NONE: UInt16 = 0
    package static let NBD_REPLY_TYPE_OFFSET_DATA: UInt16 = 1
    package static let NBD_REPLY_TYPE_BLOCK_STATUS: UInt16 = 5
    package static let NBD_REPLY_TYPE_ERROR: UInt16 = 1 << 15 | 1

    /// The id we give `base:allocation`, the only metadata context there is.
    package static let baseAllocationID: UInt32 = 1
    package static let baseAllocation = "base:allocation"
    /// "Values": names and queries are at most 4096 bytes.
    package static let maximumString = 4096
    /// Most bytes of an option's data that are kept; larger options are drained and refused.
    package static let maximumOption = 64 << 10
    /// Most bytes of one READ or WRITE ("Block sizes": what clients that do not negotiate it assume).
    package static let maximumPayload: UInt32 = 32 << 20
}

/// NBD_CMD_*, "Request types".
package enum Command: UInt16, Sendable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case cache = 5
    case writeZeroes = 6
    case blockStatus = 7

    /// Whether another value can be read after it.
    package var changesData: Bool { self == .write || self == .trim || self == .writeZeroes }

    /// Command flags this command takes ("Command flags"); FUA is accepted everywhere.
    var allowedFlags: UInt16 {
        switch self {
        case .read: NBD.NBD_CMD_FLAG_FUA | NBD.NBD_CMD_FLAG_DF
        case .writeZeroes: NBD.NBD_CMD_FLAG_FUA | NBD.NBD_CMD_FLAG_NO_HOLE | NBD.NBD_CMD_FLAG_FAST_ZERO
        case .blockStatus: NBD.NBD_CMD_FLAG_FUA | NBD.NBD_CMD_FLAG_REQ_ONE
        case .write, .disconnect, .flush, .trim, .cache: NBD.NBD_CMD_FLAG_FUA
        }
    }
}

/// Error values of replies, "Error values".
package enum ReplyError {
    /// The protocol's value for an errno.
    @inline(__always)
    package static func value(errno code: Int32) -> UInt32 {
        switch code {
        case 1, 5, 12, 22, 28, 75, 95, 108: UInt32(code)
        case 13, 30: 1  // EACCES, EROFS are EPERM
        case 27, 122: 28  // EFBIG, EDQUOT are ENOSPC
        default: 5
        }
    }
}

/// One volume as NBD clients see it.
package struct Export: Sendable, Equatable {
    package var name: String
    package var description: String
    /// Bytes.
    package var size: UInt64
    package var readOnly: Bool
    /// Smallest unit and alignment of I/O, bytes.
    package var minimumBlock: UInt32
    /// Bytes.
    package var preferredBlock: UInt32 = 4096
    package var canTrim = true
    package var canZeroFast = true
    /// Of the mapping: one that is made later under the same name has another.
    package var mapping: UInt64 = 0

    package init(name: String, description: String, size: UInt64, readOnly: Bool, minimumBlock: UInt32) {
        self.name = name
        self.description = description
        self.size = size
        self.readOnly = readOnly
        self.minimumBlock = minimumBlock
    }

    /// Transmission flags; nothing that does not work is announced.
    package func transmissionFlags(structured: Bool) -> UInt16 {
        var flags =
            NBD.NBD_FLAG_HAS_FLAGS | NBD.NBD_FLAG_SEND_FLUSH | NBD.NBD_FLAG_SEND_FUA | NBD.NBD_FLAG_CAN_MULTI_CONN
            | NBD.NBD_FLAG_SEND_CACHE
        if structured { flags |= NBD.NBD_FLAG_SEND_DF }
        if readOnly { return flags | NBD.NBD_FLAG_READ_ONLY }
        flags |= NBD.NBD_FLAG_SEND_WRITE_ZEROES
        if canZeroFast { flags |= NBD.NBD_FLAG_SEND_FAST_ZERO }
        if canTrim { flags |= NBD.NBD_FLAG_SEND_TRIM }
        return flags
    }
}
