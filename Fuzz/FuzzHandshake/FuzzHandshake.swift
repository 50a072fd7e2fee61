import FuzzSupport
import NBD

/// The handshake: bytes of a client in, bytes of the server out. However the bytes are cut on their way, the server
/// must say the same, every reply must have the protocol's form, and the stream must stay in step.
///
/// The first byte of the input says how it is cut and whether many zeros follow, the rest is what the client sends.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    guard let cut = bytes.first else { return 0 }
    // An option that is too large to be kept is longer than the inputs libFuzzer makes.
    let zeros = cut & 0x80 != 0 ? 66_000 : 0
    let sent = bytes.dropFirst() + repeatElement(0, count: zeros)
    let whole = converse(sent, piece: .max)
    let pieces = converse(sent, piece: Int(cut % 32) + 1 + zeros / 20)
    require(whole == pieces, "the answer depends on how the bytes arrive")
    checkOutput(whole)
    return 0
}

private struct Conversation: Equatable {
    var output: [UInt8] = []
    var outcome = Handshake.Progress.needsMore
    /// What the handshake did not take.
    var rest: [UInt8] = []
}

/// Does what a connection does: receive, answer, send.
private func converse(_ bytes: ArraySlice<UInt8>, piece: Int) -> Conversation {
    var handshake = Handshake()
    var conversation = Conversation()
    var unsent = bytes
    var input: [UInt8] = []
    repeat {
        input += unsent.prefix(piece)
        unsent = unsent.dropFirst(piece)
        var before: Int
        repeat {
            before = input.count
            conversation.outcome = handshake.receive(&input, exports: Directory())
            require(input.count <= before)
            require(handshake.output.count < 2 << 20, "output grows without bound")
            conversation.output += handshake.output
            handshake.output = []
        } while conversation.outcome == .needsMore && input.count < before && !input.isEmpty
    } while conversation.outcome == .needsMore && !unsent.isEmpty
    conversation.rest = input + unsent
    return conversation
}

private struct Directory: ExportDirectory {
    func export(named name: String) -> ExportLookup {
        require(name.utf8.count <= 4096 && !name.utf8.contains(0))
        switch name {
        case "", "p/v": return .found(Self.volume("p/v", readOnly: false))
        case "p/ro": return .found(Self.volume("p/ro", readOnly: true))
        case "p/busy": return .refused("in use")
        default: return .unknown
        }
    }

    func exportNames() -> [String] { ["p/ro", "p/v"] }

    static func volume(_ name: String, readOnly: Bool) -> Export {
        Export(name: name, description: "a volume", size: 1 << 20, readOnly: readOnly, minimumBlock: 512)
    }
}

// MARK: - The form of what the server says ("Fixed newstyle negotiation", "Option reply types")

private func checkOutput(_ conversation: Conversation) {
    var reader = Reader(bytes: conversation.output[...])
    require(reader.integer(8) == NBD.NBDMAGIC && reader.integer(8) == NBD.IHAVEOPT)
    require(reader.integer(2) == 3, "fixed newstyle, no zeroes")
    var repliedToGo = false
    while reader.peek(8) == NBD.REPLY_MAGIC {
        _ = reader.integer(8)
        let option = reader.integer(4)
        let type = reader.integer(4)
        let data = reader.take(Int(reader.integer(4)))
        checkReply(option, type, data)
        repliedToGo = option == UInt64(NBD.NBD_OPT_GO) && type == UInt64(NBD.NBD_REP_ACK)
    }
    guard case .transmission(let negotiated) = conversation.outcome else {
        require(reader.bytes.isEmpty && !repliedToGo)
        return
    }
    require(negotiated.structured || !negotiated.baseAllocation)
    guard !repliedToGo else { return require(reader.bytes.isEmpty) }
    // The answer to EXPORT_NAME has no header.
    require(reader.integer(8) == negotiated.export.size)
    checkFlags(reader.integer(2))
    require(reader.bytes.isEmpty || reader.bytes == ArraySlice(repeatElement(0, count: 124)))
}

private func checkReply(_ option: UInt64, _ type: UInt64, _ data: ArraySlice<UInt8>) {
    var reader = Reader(bytes: data)
    switch UInt32(type) {
    case NBD.NBD_REP_ACK: require(data.isEmpty)
    case NBD.NBD_REP_SERVER:
        require(option == UInt64(NBD.NBD_OPT_LIST))
        require(!reader.take(Int(reader.integer(4))).isEmpty)
    case NBD.NBD_REP_INFO:
        require(option == UInt64(NBD.NBD_OPT_INFO) || option == UInt64(NBD.NBD_OPT_GO))
        checkInformation(&reader)
    case NBD.NBD_REP_META_CONTEXT:
        require(reader.integer(4) == (option == UInt64(NBD.NBD_OPT_SET_META_CONTEXT) ? 1 : 0))
        require(reader.bytes.elementsEqual(NBD.baseAllocation.utf8))
    case let error:
        require(error & 0x8000_0000 != 0, "unknown reply type")
        require(data.count <= NBD.maximumString && String(validating: data, as: UTF8.self) != nil)
    }
}

private func checkInformation(_ reader: inout Reader) {
    switch UInt16(reader.integer(2)) {
    case NBD.NBD_INFO_EXPORT:
        require(reader.integer(8) == 1 << 20)
        checkFlags(reader.integer(2))
        require(reader.bytes.isEmpty)
    case NBD.NBD_INFO_BLOCK_SIZE:
        require(reader.integer(4) == 512 && reader.integer(4) == 4096 && reader.integer(4) == 32 << 20)
        require(reader.bytes.isEmpty)
    case NBD.NBD_INFO_NAME, NBD.NBD_INFO_DESCRIPTION: require(!reader.bytes.isEmpty)
    default: require(false, "unknown information")
    }
}

private func checkFlags(_ flags: UInt64) {
    require(flags & UInt64(NBD.NBD_FLAG_HAS_FLAGS) != 0)
    if flags & UInt64(NBD.NBD_FLAG_READ_ONLY) != 0 {
        require(flags & UInt64(NBD.NBD_FLAG_SEND_TRIM | NBD.NBD_FLAG_SEND_WRITE_ZEROES) == 0)
    }
}

private struct Reader {
    var bytes: ArraySlice<UInt8>

    func peek(_ count: Int) -> UInt64? {
        bytes.count < count ? nil : bytes.prefix(count).reduce(0) { $0 << 8 | UInt64($1) }
    }

    mutating func integer(_ count: Int) -> UInt64 {
        take(count).reduce(0) { $0 << 8 | UInt64($1) }
    }

    mutating func take(_ count: Int) -> ArraySlice<UInt8> {
        require(bytes.count >= count, "a reply is shorter than it says")
        defer { bytes = bytes.dropFirst(count) }
        return bytes.prefix(count)
    }
}
