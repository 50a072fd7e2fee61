import NBD

/// One request as the client sends it.
struct ClientRequest {
    var type: UInt16
    var flags: UInt16
    var offset: UInt64
    var length: UInt32
    /// Differs from request to request.
    var seed: UInt8

    /// What a write puts into a block of 512 bytes, counted from the front of the volume; never 0.
    func value(ofBlock block: Int) -> UInt8 { UInt8((Int(seed) &* 37 &+ block &* 11) % 251 &+ 1) }

    /// A write's first bytes.
    func payload(_ count: Int) -> [UInt8] {
        let start = Int(truncatingIfNeeded: offset & 0xff_ffff)
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        while bytes.count < count {
            let position = start + bytes.count
            let length = min(count - bytes.count, 512 - position % 512)
            bytes += [UInt8](repeating: value(ofBlock: position / 512), count: length)
        }
        return bytes
    }

    var command: Command? { Command(rawValue: type) }
    var end: UInt64 { offset &+ UInt64(length) }
}

/// What a client does in one session, decoded from the fuzzer's bytes.
///
/// Byte 0: the export (bits 0 and 1), the negotiation (2 to 4), the ending (5 and 6), delivery in small pieces (7).
/// Then requests of six bytes: the command (bits 0 to 3) with the units of offset (4, 5) and length (6, 7), the flags,
/// two bytes of offset, two of length. Command 14 sends the rest of the input as it is.
struct Script {
    enum Negotiation: UInt8 {
        case exportNameWithZeroes, exportName, go, structured, baseAllocation, baseAllocationByExportName

        var structured: Bool { rawValue >= Self.structured.rawValue }
        var hasContext: Bool { rawValue >= Self.baseAllocation.rawValue }
        var usesGo: Bool { self == .go || self == .structured || self == .baseAllocation }
    }

    enum Ending: UInt8 {
        case disconnect, shutdown, cutOff
    }

    static let maximumRequests = 48
    /// Bytes of payload in one session; a request beyond it is cut in its payload.
    private static let payloadBudget = 4 << 20
    static let cookieBase: UInt64 = 0xF0F1_F2F3_0000_0000

    let export: Export
    let negotiation: Negotiation
    private(set) var ending: Ending
    let inPieces: Bool
    private(set) var requests: [ClientRequest] = []
    /// What is sent, from the client's flags on.
    private(set) var wire: [UInt8] = []
    /// From some point on the bytes are no requests of ours: they may end the session at any time.
    private(set) var hasRawBytes = false
    /// The last request, a write whose payload ends too early: it is not answered, but may have changed something.
    private(set) var torn: ClientRequest?
    private var payload = 0

    init(decoding input: UnsafeBufferPointer<UInt8>) {
        var input = Input(bytes: input)
        let first = input.byte()
        export = Server.exports[Int(first & 3)]
        negotiation = Negotiation(rawValue: first >> 2 & 7) ?? .baseAllocation
        ending = Ending(rawValue: first >> 5 & 3) ?? .shutdown
        inPieces = first & 0x80 != 0
        negotiate()
        if !export.readOnly {
            // What earlier sessions left is no part of this one.
            add(ClientRequest(type: 6, flags: 0, offset: 0, length: UInt32(export.size), seed: 0))
        }
        while !input.isEmpty, requests.count < Self.maximumRequests, !hasRawBytes {
            decodeRequest(&input)
        }
        if ending == .disconnect, !hasRawBytes {
            append(ClientRequest(type: 2, flags: 0, offset: 0, length: 0, seed: 0), cookie: 0)
        }
    }

    private mutating func decodeRequest(_ input: inout Input) {
        let first = input.byte()
        guard first & 15 != 14 else {
            hasRawBytes = true
            wire += input.rest()
            return
        }
        let flags = UInt16(input.byte())
        let place = input.twoBytes()
        let size = input.twoBytes()
        let offset =
            switch first >> 4 & 3 {
            case 0: place * 512
            case 1: place
            case 2: place * 4096
            // Around the end of the volume and the end of all numbers.
            default: place & 1 == 0 ? export.size &- place / 2 * 512 : UInt64.max &- place
            }
        let length =
            switch first >> 6 {
            case 0: size * 512
            case 1: size
            case 2: size * 4096
            default: size << 16 | place
            }
        let type = UInt16(first & 15)
        // DISC is for the end.
        guard type != 2 else { return }
        add(
            ClientRequest(
                type: type, flags: flags, offset: offset, length: UInt32(truncatingIfNeeded: length),
                seed: UInt8(requests.count + 1)))
    }

    private mutating func add(_ request: ClientRequest) {
        append(request, cookie: Self.cookieBase + UInt64(requests.count))
        guard request.command == .write else {
            requests.append(request)
            return
        }
        payload += Int(request.length)
        if payload <= Self.payloadBudget {
            requests.append(request)
            wire += request.payload(Int(request.length))
        } else {
            hasRawBytes = true
            torn = request
            wire += request.payload(1000)
        }
    }

    private mutating func append(_ request: ClientRequest, cookie: UInt64) {
        wire.append(NBD.NBD_REQUEST_MAGIC)
        wire.append(request.flags)
        wire.append(request.type)
        wire.append(cookie)
        wire.append(request.offset)
        wire.append(request.length)
    }

    // MARK: Negotiation

    private mutating func negotiate() {
        wire.append(UInt32(negotiation == .exportNameWithZeroes ? 1 : 3))
        if negotiation.structured { option(NBD.NBD_OPT_STRUCTURED_REPLY, []) }
        let name = Array(export.name.utf8)
        if negotiation.hasContext {
            var data: [UInt8] = []
            data.append(UInt32(name.count))
            data += name
            data.append(UInt32(1))
            data.append(UInt32(NBD.baseAllocation.utf8.count))
            data += NBD.baseAllocation.utf8
            option(NBD.NBD_OPT_SET_META_CONTEXT, data)
        }
        guard negotiation.usesGo else { return option(NBD.NBD_OPT_EXPORT_NAME, name) }
        var data: [UInt8] = []
        data.append(UInt32(name.count))
        data += name
        data.append(UInt16(0))
        option(NBD.NBD_OPT_GO, data)
    }

    private mutating func option(_ option: UInt32, _ data: [UInt8]) {
        wire.append(NBD.IHAVEOPT)
        wire.append(option)
        wire.append(UInt32(data.count))
        wire += data
    }
}

/// The fuzzer's bytes; zeros behind their end.
private struct Input {
    let bytes: UnsafeBufferPointer<UInt8>
    private var position = 0

    init(bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

    var isEmpty: Bool { position >= bytes.count }

    mutating func byte() -> UInt8 {
        guard !isEmpty else { return 0 }
        defer { position += 1 }
        return bytes[position]
    }

    mutating func twoBytes() -> UInt64 { UInt64(byte()) << 8 | UInt64(byte()) }

    mutating func rest() -> [UInt8] {
        defer { position = bytes.count }
        return isEmpty ? [] : Array(bytes[position...])
    }
}

extension [UInt8] {
    fileprivate mutating func append<Value: FixedWidthInteger>(_ value: Value) {
        Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
    }
}
