/// What an export name leads to.
package enum ExportLookup: Sendable {
    case found(Export)
    case unknown
    /// There, but not for this client now; the text goes to it.
    case refused(String)
}

/// Where a handshake finds exports.
package protocol ExportDirectory {
    func export(named name: String) -> ExportLookup
    func exportNames() -> [String]
}

/// What client and server agreed on.
package struct Negotiated: Sendable, Equatable {
    package var export: Export
    /// Structured replies.
    package var structured: Bool
    /// BLOCK_STATUS with `base:allocation`.
    package var baseAllocation: Bool

    package init(export: Export, structured: Bool, baseAllocation: Bool) {
        self.export = export
        self.structured = structured
        self.baseAllocation = baseAllocation
    }
}

/// The server's side of the fixed newstyle handshake: bytes in, bytes out, no socket.
package struct Handshake {
    package enum Progress: Equatable {
        case needsMore
        /// Bytes behind the last option belong to the transmission phase.
        case transmission(Negotiated)
        /// The output is still to be sent.
        case closed(String)
    }

    private enum State {
        case clientFlags
        case option
        case data(option: UInt32, length: Int)
        case drain(option: UInt32, left: Int)
        case ended
    }

    private var state = State.clientFlags
    private var noZeroes = false
    private var structured = false
    /// The export the metadata context was selected for.
    private var contextExport: String?
    /// Bytes for the client, taken by the caller.
    package var output: [UInt8] = []

    package init() {
        output.append(bigEndian: NBD.NBDMAGIC)
        output.append(bigEndian: NBD.IHAVEOPT)
        output.append(bigEndian: NBD.NBD_FLAG_FIXED_NEWSTYLE | NBD.NBD_FLAG_NO_ZEROES)
    }

    /// Beyond this much unsent output no more options are handled: a client that does not read its answers waits.
    private static let outputLimit = 256 << 10

    /// Takes as much of `input` as makes whole messages, and removes it. Call again with what is left when output
    /// was sent.
    package mutating func receive(_ input: inout [UInt8], exports: some ExportDirectory) -> Progress {
        var rest = input[...]
        defer { input = Array(rest) }
        while true {
            if case .drain(let option, let left) = state {
                let count = min(left, rest.count)
                rest = rest.dropFirst(count)
                if count < left {
                    state = .drain(option: option, left: left - count)
                    return .needsMore
                }
                reply(option, NBD.NBD_REP_ERR_TOO_BIG, text: "option data is larger than 64 KiB")
                state = .option
                continue
            }
            guard rest.count >= neededBytes, output.count < Self.outputLimit else { return .needsMore }
            var reader = ByteReader(rest.prefix(neededBytes))
            rest = rest.dropFirst(neededBytes)
            if let progress = step(&reader, exports) {
                state = .ended
                return progress
            }
        }
    }

    private var neededBytes: Int {
        switch state {
        case .clientFlags: 4
        case .option: 16
        case .data(_, let length): length
        case .drain, .ended: 0
        }
    }

    /// Handles one whole message; nil to go on.
    private mutating func step(_ reader: inout ByteReader, _ exports: some ExportDirectory) -> Progress? {
        switch state {
        case .clientFlags:
            let flags = reader.integer(UInt32.self) ?? 0
            let known = UInt32(NBD.NBD_FLAG_FIXED_NEWSTYLE | NBD.NBD_FLAG_NO_ZEROES)
            guard flags & ~known == 0 else { return .closed("unknown client flags 0x\(String(flags, radix: 16))") }
            noZeroes = flags & UInt32(NBD.NBD_FLAG_NO_ZEROES) != 0
            state = .option
        case .option:
            guard reader.integer(UInt64.self) == NBD.IHAVEOPT, let option = reader.integer(UInt32.self),
                let length = reader.integer(UInt32.self)
            else { return .closed("wrong option magic") }
            if length > NBD.maximumOption {
                // There is no way to answer this one but the end of the session.
                if option == NBD.NBD_OPT_EXPORT_NAME { return .closed("export name of \(length) bytes") }
                state = .drain(option: option, left: Int(length))
            } else {
                state = .data(option: option, length: Int(length))
            }
        case .data(let option, _):
            state = .option
            return handle(option, &reader, exports)
        case .drain, .ended:
            return .closed("the handshake has ended")
        }
        return nil
    }

    private mutating func handle(
        _ option: UInt32, _ reader: inout ByteReader, _ exports: some ExportDirectory
    ) -> Progress? {
        switch option {
        case NBD.NBD_OPT_EXPORT_NAME: return exportName(reader.bytes, exports)
        case NBD.NBD_OPT_ABORT:
            reply(option, NBD.NBD_REP_ACK)
            return .closed("the client aborted")
        case NBD.NBD_OPT_LIST: list(&reader, exports)
        case NBD.NBD_OPT_INFO, NBD.NBD_OPT_GO: return information(option, &reader, exports)
        case NBD.NBD_OPT_STRUCTURED_REPLY:
            guard reader.isEmpty else {
                reply(option, NBD.NBD_REP_ERR_INVALID, text: "this option takes no data")
                return nil
            }
            structured = true
            reply(option, NBD.NBD_REP_ACK)
        case NBD.NBD_OPT_LIST_META_CONTEXT, NBD.NBD_OPT_SET_META_CONTEXT: metaContext(option, &reader, exports)
        default: reply(option, NBD.NBD_REP_ERR_UNSUP, text: "option \(option) is not supported")
        }
        return nil
    }

    // MARK: Options

    private mutating func exportName(_ bytes: ArraySlice<UInt8>, _ exports: some ExportDirectory) -> Progress {
        guard bytes.count <= NBD.maximumString, let name = Self.string(bytes) else {
            return .closed("export name is not text of at most 4096 bytes")
        }
        guard case .found(let export) = exports.export(named: name) else {
            return .closed("no export \(quoted(name))")
        }
        output.append(bigEndian: export.size)
        output.append(bigEndian: export.transmissionFlags(structured: structured))
        if !noZeroes { output.append(contentsOf: repeatElement(0, count: 124)) }
        return .transmission(negotiated(export))
    }

    private mutating func list(_ reader: inout ByteReader, _ exports: some ExportDirectory) {
        guard reader.isEmpty else {
            return reply(NBD.NBD_OPT_LIST, NBD.NBD_REP_ERR_INVALID, text: "this option takes no data")
        }
        for name in exports.exportNames() {
            var data: [UInt8] = []
            data.append(bigEndian: UInt32(name.utf8.count))
            data.append(contentsOf: name.utf8)
            reply(NBD.NBD_OPT_LIST, NBD.NBD_REP_SERVER, data)
        }
        reply(NBD.NBD_OPT_LIST, NBD.NBD_REP_ACK)
    }

    private mutating func information(
        _ option: UInt32, _ reader: inout ByteReader, _ exports: some ExportDirectory
    ) -> Progress? {
        guard let name = Self.name(&reader), let count = reader.integer(UInt16.self),
            let requests = reader.take(2 * Int(count)), reader.isEmpty
        else {
            reply(option, NBD.NBD_REP_ERR_INVALID, text: "the option's fields do not fit its length")
            return nil
        }
        guard let export = lookUp(option, name, exports) else { return nil }
        var wanted = ByteReader(requests)
        var information: [UInt8] = []
        information.append(bigEndian: NBD.NBD_INFO_EXPORT)
        information.append(bigEndian: export.size)
        information.append(bigEndian: export.transmissionFlags(structured: structured))
        reply(option, NBD.NBD_REP_INFO, information)
        var wantsName = false
        var wantsDescription = false
        while let type = wanted.integer(UInt16.self) {
            wantsName = wantsName || type == NBD.NBD_INFO_NAME
            wantsDescription = wantsDescription || type == NBD.NBD_INFO_DESCRIPTION
        }
        if wantsName { replyText(option, NBD.NBD_INFO_NAME, export.name) }
        if wantsDescription { replyText(option, NBD.NBD_INFO_DESCRIPTION, export.description) }
        var sizes: [UInt8] = []
        sizes.append(bigEndian: NBD.NBD_INFO_BLOCK_SIZE)
        sizes.append(bigEndian: export.minimumBlock)
        sizes.append(bigEndian: export.preferredBlock)
        sizes.append(bigEndian: NBD.maximumPayload)
        reply(option, NBD.NBD_REP_INFO, sizes)
        reply(option, NBD.NBD_REP_ACK)
        return option == NBD.NBD_OPT_GO ? .transmission(negotiated(export)) : nil
    }

    private mutating func metaContext(
        _ option: UInt32, _ reader: inout ByteReader, _ exports: some ExportDirectory
    ) {
        guard structured else {
            return reply(option, NBD.NBD_REP_ERR_INVALID, text: "structured replies must be agreed on first")
        }
        if option == NBD.NBD_OPT_SET_META_CONTEXT { contextExport = nil }
        guard let name = Self.name(&reader), let count = reader.integer(UInt32.self) else {
            return reply(option, NBD.NBD_REP_ERR_INVALID, text: "the option's fields do not fit its length")
        }
        let listing = option == NBD.NBD_OPT_LIST_META_CONTEXT
        var selected = listing && count == 0
        for _ in 0..<count {
            guard let length = reader.integer(UInt32.self), length <= NBD.maximumString,
                let query = reader.take(Int(length))
            else {
                return reply(option, NBD.NBD_REP_ERR_INVALID, text: "the option's queries do not fit its length")
            }
            if query.elementsEqual(NBD.baseAllocation.utf8) || listing && query.elementsEqual("base:".utf8) {
                selected = true
            }
        }
        guard reader.isEmpty else {
            return reply(option, NBD.NBD_REP_ERR_INVALID, text: "the option has bytes behind its last query")
        }
        guard let export = lookUp(option, name, exports) else { return }
        if selected {
            var data: [UInt8] = []
            data.append(bigEndian: listing ? 0 : NBD.baseAllocationID)
            data.append(contentsOf: NBD.baseAllocation.utf8)
            reply(option, NBD.NBD_REP_META_CONTEXT, data)
            if !listing { contextExport = export.name }
        }
        reply(option, NBD.NBD_REP_ACK)
    }

    // MARK: Pieces

    private func negotiated(_ export: Export) -> Negotiated {
        Negotiated(
            export: export, structured: structured, baseAllocation: structured && contextExport == export.name)
    }

    private mutating func lookUp(_ option: UInt32, _ name: String, _ exports: some ExportDirectory) -> Export? {
        switch exports.export(named: name) {
        case .found(let export): return export
        case .unknown: reply(option, NBD.NBD_REP_ERR_UNKNOWN, text: "no export \(quoted(name))")
        case .refused(let why): reply(option, NBD.NBD_REP_ERR_POLICY, text: why)
        }
        return nil
    }

    private func quoted(_ name: String) -> String { "'\(name.prefix(256))'" }

    private static func name(_ reader: inout ByteReader) -> String? {
        guard let length = reader.integer(UInt32.self), length <= NBD.maximumString,
            let bytes = reader.take(Int(length))
        else { return nil }
        return string(bytes)
    }

    /// UTF-8 without NUL, as the protocol's "Values" ask.
    private static func string(_ bytes: ArraySlice<UInt8>) -> String? {
        guard !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }

    private mutating func replyText(_ option: UInt32, _ type: UInt16, _ text: String) {
        var data: [UInt8] = []
        data.append(bigEndian: type)
        data.append(contentsOf: text.utf8)
        reply(option, NBD.NBD_REP_INFO, data)
    }

    private mutating func reply(_ option: UInt32, _ type: UInt32, text: String) {
        reply(option, type, Array(text.utf8.prefix(NBD.maximumString)))
    }

    private mutating func reply(_ option: UInt32, _ type: UInt32, _ data: [UInt8] = []) {
        output.append(bigEndian: NBD.REPLY_MAGIC)
        output.append(bigEndian: option)
        output.append(bigEndian: type)
        output.append(bigEndian: UInt32(data.count))
        output.append(contentsOf: data)
    }
}
