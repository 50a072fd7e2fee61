import PureFlash
import Testing

/// Annotated hex: everything behind `;` on a line is a comment.
private func hex(_ text: String) -> [UInt8] {
    text.split(separator: "\n").flatMap { line -> [UInt8] in
        let digits = (line.split(separator: ";", omittingEmptySubsequences: false).first ?? "").filter(\.isHexDigit)
        return stride(from: 0, to: digits.count, by: 2).compactMap { index in
            UInt8(digits.dropFirst(index).prefix(2), radix: 16)
        }
    }
}

private func encoded(_ size: Int, _ encode: (UnsafeMutableRawPointer) -> Void) -> [UInt8] {
    // What is there before must not shine through.
    var bytes = [UInt8](repeating: 0xa5, count: size)
    bytes.withUnsafeMutableBytes { buffer in
        if let base = buffer.baseAddress { encode(base) }
    }
    return bytes
}

private func decoded<Message>(_ bytes: [UInt8], _ decode: (UnsafeRawPointer) -> Message) throws -> Message {
    // At an odd address, as in a stream.
    try ([0] + bytes).withUnsafeBytes { buffer in decode(try #require(buffer.baseAddress) + 1) }
}

/// Frames recorded between the reference client and a running store.
@Suite struct StoreProtocolTests {
    static let volume: UInt64 = 0x4200_0000

    @Test func handshakeOfAClient() throws {
        let frame = hex(
            """
            00 00 78 00 00 00 00 00 00 00 00 42 00 00 00 00 ; time-out 0, depth 120, volume 0x42000000
            00 00 00 00 01 00 00 00 00 00 00 00 00 00 00 00 ; version 1
            """)
        let message = StoreHandshake(depth: 120, volumeID: Self.volume)
        #expect(frame.count == StoreHandshake.size)
        #expect(try decoded(frame, StoreHandshake.init) == message)
        #expect(encoded(StoreHandshake.size, message.encode) == frame)
    }

    @Test func handshakeOfAStore() throws {
        let frame = hex(
            """
            00 00 78 00 00 00 00 00 00 00 00 42 00 00 00 00
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 ; result 0
            """)
        let message = StoreHandshake(depth: 120, volumeID: Self.volume, result: 0)
        #expect(try decoded(frame, StoreHandshake.init) == message)
        #expect(encoded(StoreHandshake.size, message.encode) == frame)
    }

    @Test func write() throws {
        let frame = hex(
            """
            01 00 02 00 ff ff ff ff 00 00 00 42 00 00 00 00 ; WRITE, id 2, HEAD, volume
            00 30 cf 4c 49 7f 00 00 00 00 00 00 00 00 00 00 ; the client's buffer, no key, layout 0
            00 20 00 00 00 00 00 00 00 10 00 00 00 00 00 00 ; at 8192, 4096 bytes, sent first
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            """)
        var message = StoreCommand(
            .write, id: 2, volumeID: Self.volume, metaVersion: 0, offset: 8192, length: 4096)
        message.address = 0x7f49_4ccf_3000
        #expect(frame.count == StoreCommand.size)
        #expect(try decoded(frame, StoreCommand.init) == message)
        #expect(encoded(StoreCommand.size, message.encode) == frame)
    }

    @Test func read() throws {
        let frame = hex(
            """
            02 00 01 00 ff ff ff ff 00 00 00 42 00 00 00 00 ; READ, id 1
            00 f0 21 d2 86 7f 00 00 00 00 00 00 00 00 00 00
            00 00 22 00 00 00 00 00 00 00 02 00 00 00 00 00 ; at 2228224, 131072 bytes
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            """)
        var message = StoreCommand(
            .read, id: 1, volumeID: Self.volume, metaVersion: 0, offset: 2_228_224, length: 131_072)
        message.address = 0x7f86_d221_f000
        #expect(try decoded(frame, StoreCommand.init) == message)
        #expect(encoded(StoreCommand.size, message.encode) == frame)
    }

    @Test func everyFieldOfACommand() throws {
        var message = StoreCommand(
            .read, id: 0x1234, volumeID: 0x1122_3344_5566_7788, metaVersion: 0x99aa, offset: 0x0102_0304_0506_0708,
            length: 0x0910_1112, sequence: 0x1314_1516, snapshot: 0x1718_1920)
        message.key = 0x2122_2324
        let frame = hex(
            """
            02 00 34 12 20 19 18 17 88 77 66 55 44 33 22 11
            00 00 00 00 00 00 00 00 24 23 22 21 aa 99 00 00
            08 07 06 05 04 03 02 01 12 11 10 09 16 15 14 13
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            """)
        #expect(encoded(StoreCommand.size, message.encode) == frame)
        #expect(try decoded(frame, StoreCommand.init) == message)
    }

    @Test func reply() throws {
        let frame = hex(
            """
            00 00 00 00 02 00 00 00 00 00 00 00 00 00 00 00 ; SUCCESS, id 2, sent first
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            """)
        let message = StoreReply(status: .success, id: 2, sequence: 0)
        #expect(frame.count == StoreReply.size)
        #expect(try decoded(frame, StoreReply.init) == message)
        #expect(encoded(StoreReply.size, message.encode) == frame)
    }

    @Test("which commands are sent again, and which fail at once")
    func mayPass() {
        let again = [0x05, 0x06, 0x07, 0x09, 0x82, 0xC0, 0xC3, 0xC5, 0xC7, 0xC8, 0xC9, 0xCE, 0xCF]
        let final = [
            0x00, 0x01, 0x02, 0x03, 0x04, 0x08, 0x80, 0xC1, 0xC2, 0xC4, 0xC6, 0xCA, 0xCB, 0xCC, 0xCD, 0x0a, 0xD0,
        ]
        for code in again + final {
            let status = StoreStatus(rawValue: UInt16(code))
            #expect(status.mayPass == again.contains(code), "\(status)")
            #expect(StoreStatus(rawValue: UInt16(0x2000 | code)).mayPass == again.contains(code), "\(status)")
            #expect(StoreStatus(rawValue: UInt16(0x4000 | code)).mayPass, "\(status)")
        }
    }

    @Test func everyFieldOfAReply() throws {
        var message = StoreReply(
            status: .notPrimary.withReopen, metaVersion: 0x0203, id: 0x0405, sequence: 0x0607_0809)
        message.block = 0x1011_1213
        let frame = hex(
            """
            c0 40 03 02 05 04 00 00 09 08 07 06 13 12 11 10
            00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            """)
        #expect(encoded(StoreReply.size, message.encode) == frame)
        #expect(try decoded(frame, StoreReply.init) == message)
    }

    @Test(arguments: [
        (0x0000, 0x00, false, false, "SUCCESS"), (0x4000, 0x00, false, true, "REOPEN"),
        (0x4009, 0x09, false, true, "INVALID_STATE, REOPEN"), (0x2000, 0x00, true, false, "SUCCESS, DEGRADE"),
        (0x60c0, 0xc0, true, true, "NOT_PRIMARY, DEGRADE, REOPEN"), (0x00c2, 0xc2, false, false, "READONLY"),
        (0x1fff, 0x1fff, false, false, "status 0x1fff"),
    ])
    func status(raw: Int, code: Int, degraded: Bool, reopen: Bool, text: String) {
        let status = StoreStatus(rawValue: UInt16(raw))
        #expect(status.code.rawValue == UInt16(code))
        #expect(status.isDegraded == degraded)
        #expect(status.asksToReopen == reopen)
        #expect("\(status)" == text)
    }
}
