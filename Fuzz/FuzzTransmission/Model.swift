import FuzzSupport
import Glibc
import NBD

/// What the protocol document says a server must answer, worked out from the script alone.
struct Model {
    private let script: Script
    private let changes: [Change]

    /// A request that changed blocks, in the order sent, which is the order in which they take effect.
    private struct Change {
        let index: Int
        let request: ClientRequest
        /// Units of 512 bytes.
        let blocks: Range<Int>
        /// TRIM leaves open what is read afterwards, and so does a write that was cut off.
        let isCertain: Bool

        init(_ index: Int, _ request: ClientRequest, isCertain: Bool) {
            self.index = index
            self.request = request
            self.isCertain = isCertain
            blocks = Int(request.offset / 512)..<Int(request.end / 512)
        }

        func value(ofBlock block: Int) -> UInt8 { request.command == .write ? request.value(ofBlock: block) : 0 }
    }

    private static let EPERM: UInt32 = 1
    private static let EIO: UInt32 = 5
    private static let EINVAL: UInt32 = 22
    private static let ENOSPC: UInt32 = 28
    private static let ENOTSUP: UInt32 = 95

    init(_ script: Script) {
        self.script = script
        var changes: [Change] = []
        for (index, request) in script.requests.enumerated() where request.length > 0 {
            guard Self.errors(request, script) == [0] else { continue }
            switch request.command {
            case .write, .writeZeroes: changes.append(Change(index, request, isCertain: true))
            case .trim: changes.append(Change(index, request, isCertain: false))
            default: break
            }
        }
        if let torn = script.torn, Self.errors(torn, script) == [0] {
            changes.append(Change(script.requests.count, torn, isCertain: false))
        }
        self.changes = changes
    }

    /// Looks at every reply there is.
    func check(_ replies: [Reply?]) {
        // What the blocks most probably hold when a request is handled, so that few have to be looked at closely.
        var likely = [UInt8](repeating: 0, count: Int(script.export.size / 512))
        var changes = changes[...]
        for (index, reply) in replies.enumerated() {
            if let reply {
                check(reply, to: index, likely)
            } else {
                require(script.hasRawBytes, "request \(index), \(script.requests[index]), was not answered")
            }
            if let change = changes.first, change.index == index {
                for block in change.blocks { likely[block] = change.value(ofBlock: block) }
                changes.removeFirst()
            }
        }
    }

    private func check(_ reply: Reply, to index: Int, _ likely: [UInt8]) {
        let request = script.requests[index]
        let allowed = Self.errors(request, script)
        require(allowed.contains(reply.error), "\(request) was answered \(reply.error), not one of \(allowed)")
        guard reply.error == 0 else { return }
        switch request.command {
        case .read: checkData(reply.data, request, index, likely)
        case .blockStatus: checkExtents(reply, request, index)
        default: break
        }
    }

    // MARK: Errors ("Error values", "Request types")

    /// Every error that applies; 0 alone when none does.
    private static func errors(_ request: ClientRequest, _ script: Script) -> Set<UInt32> {
        guard let command = request.command else { return [EINVAL] }
        var errors: Set<UInt32> = []
        if request.flags & ~flags(command, script.negotiation) != 0 { errors.insert(EINVAL) }
        if command == .flush || command == .disconnect { return errors.isEmpty ? [0] : errors }
        if command == .read || command == .write, request.length > 32 << 20 { errors.insert(EINVAL) }
        let (end, overflow) = request.offset.addingReportingOverflow(UInt64(request.length))
        let writes = command == .write || command == .writeZeroes
        if overflow || end > script.export.size { errors.insert(writes ? ENOSPC : EINVAL) }
        if (request.offset | UInt64(request.length)) % UInt64(script.export.minimumBlock) != 0 { errors.insert(EINVAL) }
        if script.export.readOnly, writes || command == .trim { errors.insert(EPERM) }
        if command == .blockStatus, !script.negotiation.hasContext || request.length == 0 { errors.insert(EINVAL) }
        if command == .read, errors.isEmpty, request.length > 0, script.export.name == "shuffled/v512",
            ShuffledBackend.unreadable.overlaps(request.offset..<end)
        {
            errors.insert(EIO)
        }
        return errors.isEmpty ? [0] : errors
    }

    /// Those a client may set ("Command flags").
    private static func flags(_ command: Command, _ negotiation: Script.Negotiation) -> UInt16 {
        switch command {
        case .read: NBD.NBD_CMD_FLAG_FUA | (negotiation.structured ? NBD.NBD_CMD_FLAG_DF : 0)
        case .writeZeroes: NBD.NBD_CMD_FLAG_FUA | NBD.NBD_CMD_FLAG_NO_HOLE | NBD.NBD_CMD_FLAG_FAST_ZERO
        case .blockStatus: NBD.NBD_CMD_FLAG_FUA | NBD.NBD_CMD_FLAG_REQ_ONE
        default: NBD.NBD_CMD_FLAG_FUA
        }
    }

    // MARK: Data

    private func checkData(_ data: ArraySlice<UInt8>, _ request: ClientRequest, _ index: Int, _ likely: [UInt8]) {
        // Raw bytes can be writes that nobody here knows of.
        if script.hasRawBytes, script.torn == nil { return }
        let first = Int(request.offset / 512)
        data.withUnsafeBytes { data in
            for block in 0..<data.count / 512 {
                let bytes = UnsafeRawBufferPointer(rebasing: data[block * 512..<block * 512 + 512])
                if Self.isFilled(bytes, with: likely[first + block]) { continue }
                let allowed = values(of: first + block, at: index)
                require(
                    bytes.allSatisfy { allowed.contains($0) },
                    "request \(index), \(request): block \(first + block) reads \(bytes[0]), not one of \(allowed)")
            }
        }
    }

    private static func isFilled(_ bytes: UnsafeRawBufferPointer, with value: UInt8) -> Bool {
        guard let base = bytes.baseAddress else { return true }
        // The first byte is right, and each is as the one before.
        return bytes[0] == value && memcmp(base, base + 1, bytes.count - 1) == 0
    }

    private func checkExtents(_ reply: Reply, _ request: ClientRequest, _ index: Int) {
        require(reply.isStructured && !reply.extents.isEmpty)
        if request.flags & NBD.NBD_CMD_FLAG_REQ_ONE != 0 {
            require(reply.extents.count == 1 && reply.extents[0].length <= request.length)
        }
        var position = request.offset
        for (number, extent) in reply.extents.enumerated() {
            require(extent.length > 0 && extent.length % script.export.minimumBlock == 0 && extent.flags <= 3)
            // Only the last may go beyond what was asked.
            require(position + UInt64(extent.length) <= request.end || number == reply.extents.count - 1)
            if extent.flags & 2 != 0 {
                for block in position / 512..<min(position + UInt64(extent.length), script.export.size) / 512 {
                    require(values(of: Int(block), at: index).contains(0), "block \(block) is not zero")
                }
            }
            position += UInt64(extent.length)
        }
    }

    /// What a block may hold for a request: what was there when it was sent, or what a later one put there before the
    /// reply was sent.
    private func values(of block: Int, at index: Int) -> Set<UInt8> {
        var values: Set<UInt8> = [0]
        for change in changes where change.blocks.contains(block) {
            if change.index < index, change.isCertain { values = [] }
            values.insert(change.value(ofBlock: block))
        }
        return values
    }
}
