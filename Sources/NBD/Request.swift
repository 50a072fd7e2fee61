import EventLoop

/// The fixed part of a request ("Request message"), decoded.
package struct RequestHeader: Equatable {
    /// Bytes on the wire.
    package static let size = 28

    package var flags: UInt16
    package var type: UInt16
    package var cookie: UInt64
    package var offset: UInt64
    package var length: UInt32

    package init(flags: UInt16, type: UInt16, cookie: UInt64, offset: UInt64, length: UInt32) {
        self.flags = flags
        self.type = type
        self.cookie = cookie
        self.offset = offset
        self.length = length
    }

    /// - Parameter bytes: `size` bytes of any alignment.
    /// - Returns: nil when the magic is wrong: the stream is out of step and there is no way back.
    @inline(__always)
    package static func decode(_ bytes: UnsafeRawPointer) -> RequestHeader? {
        guard bytes.load(bigEndian: UInt32.self, at: 0) == NBD.NBD_REQUEST_MAGIC else { return nil }
        return RequestHeader(
            flags: bytes.load(bigEndian: UInt16.self, at: 4), type: bytes.load(bigEndian: UInt16.self, at: 6),
            cookie: bytes.load(bigEndian: UInt64.self, at: 8), offset: bytes.load(bigEndian: UInt64.self, at: 16),
            length: bytes.load(bigEndian: UInt32.self, at: 24))
    }
}

/// Why a request is refused before it reaches the volume.
package struct Refusal {
    package let errno: Int32
    package let text: StaticString
}

/// What a session needs to know of its volume to judge requests.
package struct RequestLimits {
    /// Bytes.
    package var size: UInt64
    /// Bytes, a power of two.
    package var minimumBlock: UInt32
    package var readOnly: Bool
    package var canTrim: Bool
    package var structured: Bool
    package var baseAllocation: Bool

    package init(_ negotiated: Negotiated) {
        size = negotiated.export.size
        minimumBlock = negotiated.export.minimumBlock
        readOnly = negotiated.export.readOnly
        canTrim = negotiated.export.canTrim
        structured = negotiated.structured
        baseAllocation = negotiated.baseAllocation
    }

    /// Judges a request as the protocol's "Request types" and "Error values" say; nil lets it pass. DISC always passes.
    @inline(__always)
    package func refusal(of header: RequestHeader, _ command: Command?) -> Refusal? {
        guard let command else { return Refusal(errno: 22, text: "unknown command") }
        if command != .disconnect, header.flags & ~command.allowedFlags != 0 {
            return Refusal(errno: 22, text: "flag not allowed here")
        }
        switch command {
        case .disconnect, .flush: return nil
        case .read:
            if header.flags & NBD.NBD_CMD_FLAG_DF != 0, !structured {
                return Refusal(errno: 22, text: "DF needs structured replies")
            }
            if header.length > NBD.maximumPayload { return Refusal(errno: 22, text: "more than 32 MiB") }
            return misplaced(header, beyondEnd: 22)
        case .write:
            if readOnly { return Refusal(errno: 1, text: "read-only") }
            if header.length > NBD.maximumPayload { return Refusal(errno: 22, text: "more than 32 MiB") }
            return misplaced(header, beyondEnd: 28)
        case .writeZeroes:
            if readOnly { return Refusal(errno: 1, text: "read-only") }
            return misplaced(header, beyondEnd: 28)
        case .trim:
            if readOnly { return Refusal(errno: 1, text: "read-only") }
            if !canTrim { return Refusal(errno: 22, text: "trim was not offered") }
            return misplaced(header, beyondEnd: 22)
        case .cache: return misplaced(header, beyondEnd: 22)
        case .blockStatus:
            if !baseAllocation { return Refusal(errno: 22, text: "no metadata context was selected") }
            if header.length == 0 { return Refusal(errno: 22, text: "length is 0") }
            return misplaced(header, beyondEnd: 22)
        }
    }

    @inline(__always)
    private func misplaced(_ header: RequestHeader, beyondEnd code: Int32) -> Refusal? {
        let (end, overflow) = header.offset.addingReportingOverflow(UInt64(header.length))
        if overflow || end > size { return Refusal(errno: code, text: "beyond the end of the volume") }
        if (header.offset | UInt64(header.length)) & UInt64(minimumBlock &- 1) != 0 {
            return Refusal(errno: 22, text: "not a multiple of the block size")
        }
        return nil
    }
}

/// One request of one session, from its header to its reply. Lives in a slab of the volume.
package struct Request {
    /// The reply's header, at most 28 bytes ("Structured reply chunk message" and an offset). First in the struct.
    var head: (UInt64, UInt64, UInt64, UInt64)
    /// The connection that brought it, and nothing but that connection, gets the reply.
    var session: Unmanaged<Session>
    var cookie: UInt64
    /// Bytes.
    package var offset: UInt64
    /// Bytes.
    package var length: UInt32
    package var command: Command
    package var flags: UInt16
    /// Positive errno of the first part that failed, 0 is success.
    package var status: Int32
    /// A write's payload, `length` bytes in the session's input.
    package var payload: UnsafeMutableRawPointer?
    var input: UnsafeMutablePointer<InputBuffer>?
    /// What is sent behind the reply's header: a read's data in order, or an array of `Extent`.
    package var segments: UnsafeMutablePointer<Segment>?
    /// The chain as the volume made it, kept when `segments` is not sent. For the volume alone.
    package var firstSegment: UnsafeMutablePointer<Segment>?
    package var lastSegment: UnsafeMutablePointer<Segment>?
    var headCount: Int
    var replyCount: Int
    var errorText: StaticString?
    /// The loop's `now` when the request was read.
    package var arrival: UInt64
    /// The loop's `now` when the volume let it through to its store; until then, and mostly, when it was read.
    package var admitted: UInt64
    package var place: Place
    /// Has been told as one that takes too long.
    package var isReportedSlow: Bool
    /// The reply is out as a whole.
    package var isSent = false
    /// Parts the backend has not completed, and bytes not yet handed to it. For the volume alone.
    package var pendingParts: Int32
    package var issued: UInt32
    package var next: UnsafeMutablePointer<Request>?

    init(session: Unmanaged<Session>, header: RequestHeader, command: Command, arrival: UInt64) {
        head = (0, 0, 0, 0)
        self.session = session
        cookie = header.cookie
        offset = header.offset
        length = header.length
        self.command = command
        flags = header.flags
        status = 0
        headCount = 0
        replyCount = 0
        self.arrival = arrival
        admitted = arrival
        place = .volume
        isReportedSlow = false
        pendingParts = 0
        issued = 0
    }

    /// Where the request is, for who looks for slow ones.
    package enum Place: UInt8 {
        /// With the volume and its store.
        case volume
        /// Held back because the volume is suspended.
        case gate
        /// Waiting for its limits.
        case throttle
        /// Waiting for what is in flight of a connection that was left.
        case behind
        /// Answered; the client may not have taken it yet.
        case answered
        /// The slot is free.
        case nowhere
    }

    /// Its connection is closed: nobody waits for the answer.
    package var isAbandoned: Bool { session._withUnsafeGuaranteedRef { $0.closed } }

    /// It is not answered, and changes bytes of the volume.
    package var mayChangeData: Bool { place != .nowhere && place != .answered && command.changesData }

    /// Where structured replies are negotiated; all others get simple ones even there.
    var isAnsweredInChunks: Bool { command == .read || command == .blockStatus }

    /// What the reply begins with.
    func replyMagic(structured: Bool) -> UInt32 {
        structured && isAnsweredInChunks ? NBD.NBD_STRUCTURED_REPLY_MAGIC : NBD.NBD_SIMPLE_REPLY_MAGIC
    }

    package var durable: Bool { flags & NBD.NBD_CMD_FLAG_FUA != 0 }
    package var noHole: Bool { flags & NBD.NBD_CMD_FLAG_NO_HOLE != 0 }
    package var fastZero: Bool { flags & NBD.NBD_CMD_FLAG_FAST_ZERO != 0 }
    package var oneExtent: Bool { flags & NBD.NBD_CMD_FLAG_REQ_ONE != 0 }
}

extension UnsafeMutablePointer<Request> {
    /// Answers the request; call exactly once, on the loop. The slot comes back through `SessionTarget.release`.
    @inline(__always)
    package func reply() {
        pointee.session._withUnsafeGuaranteedRef { $0.enqueueReply(self) }
    }

    /// Ends a request that was not started without answering it: its client sees the connection close. On the loop,
    /// instead of `reply`.
    package func drop() {
        pointee.session._withUnsafeGuaranteedRef { $0.drop(self) }
    }

    /// Whether this session brought the request.
    package func belongs(to session: Session) -> Bool {
        pointee.session._withUnsafeGuaranteedRef { $0 === session }
    }

    // MARK: Reply headers

    /// Writes the header for the request's status and data.
    @inline(__always)
    func buildReply(structured: Bool) {
        let head = UnsafeMutableRawPointer(self)
        let command = pointee.command
        if structured, pointee.isAnsweredInChunks {
            if pointee.status != 0 { return buildErrorChunk(head) }
            return command == .read ? buildReadChunk(head) : buildStatusChunk(head)
        }
        head.store(bigEndian: NBD.NBD_SIMPLE_REPLY_MAGIC, at: 0)
        let error = pointee.status == 0 ? 0 : ReplyError.value(errno: pointee.status)
        head.store(bigEndian: error, at: 4)
        head.store(bigEndian: pointee.cookie, at: 8)
        pointee.headCount = 16
        pointee.errorText = nil
        let data = error == 0 && command == .read ? Int(pointee.length) : 0
        if data == 0 { pointee.segments = nil }
        pointee.replyCount = 16 &+ data
    }

    private func chunk(_ head: UnsafeMutableRawPointer, type: UInt16, length: Int) {
        head.store(bigEndian: NBD.NBD_STRUCTURED_REPLY_MAGIC, at: 0)
        head.store(bigEndian: NBD.NBD_REPLY_FLAG_DONE, at: 4)
        head.store(bigEndian: type, at: 6)
        head.store(bigEndian: pointee.cookie, at: 8)
        head.store(bigEndian: UInt32(length), at: 16)
        pointee.replyCount = 20 &+ length
    }

    @inline(__always)
    private func buildReadChunk(_ head: UnsafeMutableRawPointer) {
        pointee.errorText = nil
        guard pointee.length > 0 else {
            chunk(head, type: NBD.NBD_REPLY_TYPE_NONE, length: 0)
            pointee.headCount = 20
            pointee.segments = nil
            return
        }
        chunk(head, type: NBD.NBD_REPLY_TYPE_OFFSET_DATA, length: 8 &+ Int(pointee.length))
        head.store(bigEndian: pointee.offset, at: 20)
        pointee.headCount = 28
    }

    private func buildStatusChunk(_ head: UnsafeMutableRawPointer) {
        pointee.errorText = nil
        var count = 0
        var segment = pointee.segments
        while let part = segment {
            let extents = part.pointee.base.assumingMemoryBound(to: Extent.self)
            for index in 0..<(part.pointee.count / MemoryLayout<Extent>.stride) {
                extents[index].length = extents[index].length.bigEndian
                extents[index].flags = extents[index].flags.bigEndian
            }
            count += part.pointee.count
            segment = part.pointee.next
        }
        chunk(head, type: NBD.NBD_REPLY_TYPE_BLOCK_STATUS, length: 4 + count)
        head.store(bigEndian: NBD.baseAllocationID, at: 20)
        pointee.headCount = 24
    }

    private func buildErrorChunk(_ head: UnsafeMutableRawPointer) {
        let text = pointee.errorText?.utf8CodeUnitCount ?? 0
        pointee.segments = nil
        chunk(head, type: NBD.NBD_REPLY_TYPE_ERROR, length: 6 + text)
        head.store(bigEndian: ReplyError.value(errno: pointee.status), at: 20)
        head.store(bigEndian: UInt16(text), at: 24)
        pointee.headCount = 26
    }
}
