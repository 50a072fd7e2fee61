import FuzzSupport
import NBD

/// The answer to one request, put together from its chunks.
struct Reply {
    var isStructured = false
    /// As the protocol numbers them; 0 is success.
    var error: UInt32 = 0
    /// A read's data, of the request's length.
    var data: ArraySlice<UInt8> = []
    var extents: [(length: UInt32, flags: UInt32)] = []
}

/// What the server sent, taken apart ("Simple reply message", "Structured reply chunk message").
struct Replies {
    private(set) var byRequest: [Reply?]
    private var bytes: ArraySlice<UInt8>
    private let script: Script

    init(_ bytes: ArraySlice<UInt8>, _ script: Script) {
        self.bytes = bytes
        self.script = script
        byRequest = Array(repeating: nil, count: script.requests.count)
    }

    mutating func parse() {
        skipHandshake()
        while !bytes.isEmpty {
            if script.hasRawBytes, byRequest.allSatisfy({ $0 != nil }) || bytes.count < 20 { return }
            let magic = integer(4)
            if magic == UInt64(NBD.NBD_SIMPLE_REPLY_MAGIC) {
                guard parseSimple() else { return }
            } else {
                require(magic == UInt64(NBD.NBD_STRUCTURED_REPLY_MAGIC) && script.negotiation.structured)
                guard parseChunk() else { return }
            }
        }
    }

    /// - Returns: false when this is the answer to bytes that the fuzzer made, and nothing behind it can be judged.
    private mutating func parseSimple() -> Bool {
        let error = UInt32(integer(4))
        guard let index = request(integer(8)) else { return false }
        let request = script.requests[index]
        require(request.command != .read || !script.negotiation.structured, "simple reply to a structured read")
        var reply = Reply(error: error)
        if request.command == .read, error == 0 {
            guard bytes.count >= Int(request.length) || !script.hasRawBytes else { return false }
            reply.data = take(Int(request.length))
        }
        byRequest[index] = reply
        return true
    }

    private mutating func parseChunk() -> Bool {
        let flags = UInt16(integer(2))
        let type = UInt16(integer(2))
        let cookie = integer(8)
        let length = Int(integer(4))
        guard let index = request(cookie) else { return false }
        guard bytes.count >= length || !script.hasRawBytes else { return false }
        let request = script.requests[index]
        // One chunk says all: that is how this server answers.
        require(flags == NBD.NBD_REPLY_FLAG_DONE)
        var reply = Reply(isStructured: true)
        switch type {
        case NBD.NBD_REPLY_TYPE_NONE: require(length == 0 && (request.command != .read || request.length == 0))
        case NBD.NBD_REPLY_TYPE_OFFSET_DATA:
            require(request.command == .read && length == 8 + Int(request.length))
            require(integer(8) == request.offset)
            reply.data = take(Int(request.length))
        case NBD.NBD_REPLY_TYPE_BLOCK_STATUS:
            require(request.command == .blockStatus && length >= 12 && length % 8 == 4)
            require(integer(4) == UInt64(NBD.baseAllocationID))
            for _ in 0..<length / 8 { reply.extents.append((UInt32(integer(4)), UInt32(integer(4)))) }
        case NBD.NBD_REPLY_TYPE_ERROR:
            reply.error = UInt32(integer(4))
            let text = take(Int(integer(2)))
            require(length == 6 + text.count && text.count <= NBD.maximumString)
            require(String(validating: text, as: UTF8.self) != nil && reply.error != 0)
        default: require(false, "chunk of type \(type)")
        }
        byRequest[index] = reply
        return true
    }

    /// The request of ours with this cookie, which has not been answered yet.
    private func request(_ cookie: UInt64) -> Int? {
        let index = cookie &- Script.cookieBase
        guard index < UInt64(script.requests.count), byRequest[Int(index)] == nil else {
            require(script.hasRawBytes, "reply to cookie \(cookie), which is unknown or was answered")
            return nil
        }
        return Int(index)
    }

    // MARK: Handshake

    /// FuzzHandshake looks at it closely.
    private mutating func skipHandshake() {
        _ = take(18)
        while bytes.prefix(8).elementsEqual([0x00, 0x03, 0xE8, 0x89, 0x04, 0x55, 0x65, 0xA9]) {
            _ = take(8)
            let option = integer(4)
            let type = integer(4)
            _ = take(Int(integer(4)))
            require(type & 0x8000_0000 == 0, "the negotiation failed")
            if option == UInt64(NBD.NBD_OPT_GO), type == UInt64(NBD.NBD_REP_ACK) { return }
        }
        require(!script.negotiation.usesGo)
        require(integer(8) == script.export.size)
        _ = take(script.negotiation == .exportNameWithZeroes ? 126 : 2)
    }

    private mutating func integer(_ count: Int) -> UInt64 {
        take(count).reduce(0) { $0 << 8 | UInt64($1) }
    }

    private mutating func take(_ count: Int) -> ArraySlice<UInt8> {
        require(bytes.count >= count, "the server closed within a reply")
        defer { bytes = bytes.dropFirst(count) }
        return bytes.prefix(count)
    }
}
