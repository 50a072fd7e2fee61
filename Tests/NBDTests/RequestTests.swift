import NBD
import Testing

@Suite struct RequestTests {
    private func limits(
        readOnly: Bool = false, structured: Bool = true, block: UInt32 = 512, context: Bool = true
    ) -> RequestLimits {
        let export = Export(
            name: "a", description: "", size: 1 << 20, readOnly: readOnly, minimumBlock: block)
        return RequestLimits(Negotiated(export: export, structured: structured, baseAllocation: context))
    }

    @Test func headersDecodeFieldByField() {
        let bytes = hex(
            """
            25609513         ; magic
            0001 0001        ; FUA, WRITE
            0102030405060708 ; cookie
            0000000000001000 ; offset
            00000200         ; length
            """)
        let header = bytes.withUnsafeBytes { bytes in bytes.baseAddress.flatMap { RequestHeader.decode($0) } }
        #expect(
            header
                == RequestHeader(flags: 1, type: 1, cookie: 0x0102_0304_0506_0708, offset: 4096, length: 512))
    }

    @Test func aWrongMagicIsNoRequest() {
        let bytes = hex("25609514 00010001 0102030405060708 0000000000001000 00000200")
        #expect(bytes.withUnsafeBytes { bytes in bytes.baseAddress.flatMap { RequestHeader.decode($0) } } == nil)
    }

    struct Row: Sendable, CustomTestStringConvertible {
        let type: UInt16
        let flags: UInt16
        let offset: UInt64
        let length: UInt32
        /// 0 passes.
        let errno: Int32
        init(_ type: UInt16, _ flags: UInt16, _ offset: UInt64, _ length: UInt32, _ errno: Int32) {
            (self.type, self.flags, self.offset, self.length, self.errno) = (type, flags, offset, length, errno)
        }
        var testDescription: String { "command \(type) flags \(flags) at \(offset) of \(length): \(errno)" }
    }

    static let rows: [Row] = [
        Row(0, 0, 0, 512, 0),
        Row(0, 0, 1 << 20, 512, 22),
        Row(1, 0, 1 << 20, 512, 28),
        Row(4, 0, 1 << 20, 512, 22),
        Row(6, 0, 1 << 20, 512, 28),
        Row(0, 0, (1 << 20) - 512, 1024, 22),
        Row(1, 0, (1 << 20) - 512, 1024, 28),
        Row(0, 0, .max - 511, 1024, 22),
        Row(1, 0, .max - 511, 512, 28),
        Row(0, 0, 1, 512, 22),
        Row(1, 0, 0, 513, 22),
        Row(7, 0, 256, 512, 22),
        Row(0, 0, 0, (32 << 20) + 512, 22),
        Row(1, 0, 0, (32 << 20) + 512, 22),
        Row(0, 0, 0, 0, 0),
        Row(1, 0, 0, 0, 0),
        Row(7, 0, 0, 0, 22),
        Row(8, 0, 0, 512, 22),
        Row(0xffff, 0, 0, 512, 22),
        Row(0, 2, 0, 512, 22),
        Row(1, 4, 0, 512, 22),
        Row(0, 0x20, 0, 512, 22),
        Row(6, 0x12, 0, 512, 0),
        Row(7, 8, 0, 512, 0),
        Row(0, 1, 0, 512, 0),
        Row(1, 1, 0, 512, 0),
        Row(3, 1, 0, 0, 0),
        Row(4, 1, 0, 512, 0),
        Row(5, 1, 0, 512, 0),
        Row(0, 4, 0, 512, 0),
        Row(3, 0, 12345, 99, 0),
    ]

    @Test(arguments: rows) func judged(row: Row) {
        let header = RequestHeader(
            flags: row.flags, type: row.type, cookie: 0, offset: row.offset, length: row.length)
        #expect(limits().refusal(of: header, Command(rawValue: row.type))?.errno ?? 0 == row.errno)
    }

    @Test(arguments: [UInt16(1), 4, 6]) func readOnlyRefusesChanges(type: UInt16) {
        let header = RequestHeader(flags: 0, type: type, cookie: 0, offset: 0, length: 512)
        #expect(limits(readOnly: true).refusal(of: header, Command(rawValue: type))?.errno == 1)
    }

    @Test func whatWasNotAgreedOnIsRefused() {
        let fragment = RequestHeader(flags: 4, type: 0, cookie: 0, offset: 0, length: 512)
        #expect(limits(structured: false).refusal(of: fragment, .read)?.errno == 22)
        let status = RequestHeader(flags: 0, type: 7, cookie: 0, offset: 0, length: 512)
        #expect(limits(context: false).refusal(of: status, .blockStatus)?.errno == 22)
    }

    @Test(arguments: [(Int32(5), UInt32(5)), (30, 1), (13, 1), (122, 28), (27, 28), (4, 5), (95, 95), (108, 108)])
    func errnosBecomeProtocolErrors(errno: Int32, value: UInt32) {
        #expect(ReplyError.value(errno: errno) == value)
    }
}
