import NBD
import Testing

struct OneExport: ExportDirectory {
    func export(named name: String) -> ExportLookup {
        switch name {
        case "rbd/disk": .found(Self.disk)
        case "rbd/held": .refused("not now")
        default: .unknown
        }
    }
    func exportNames() -> [String] { ["rbd/disk"] }
    static let disk = Export(name: "rbd/disk", description: "d", size: 0x4000_0000, readOnly: false, minimumBlock: 512)
}

/// Annotated hex: everything behind `;` on a line is a comment.
func hex(_ text: String) -> [UInt8] {
    text.split(separator: "\n").flatMap { line -> [UInt8] in
        let digits = (line.split(separator: ";", omittingEmptySubsequences: false).first ?? "").filter(\.isHexDigit)
        return stride(from: 0, to: digits.count, by: 2).compactMap { index in
            UInt8(digits.dropFirst(index).prefix(2), radix: 16)
        }
    }
}

@Suite struct HandshakeTests {
    let greeting = hex(
        """
        4e42444d41474943 ; NBDMAGIC
        49484156454f5054 ; IHAVEOPT
        0003             ; FIXED_NEWSTYLE | NO_ZEROES
        """)
    let flags = hex("00000003 ; FIXED_NEWSTYLE | NO_ZEROES")

    /// Feeds `input` and returns what came out behind the greeting.
    private func run(_ input: [UInt8]) -> (output: [UInt8], progress: Handshake.Progress, left: [UInt8]) {
        var handshake = Handshake()
        var input = input
        let progress = handshake.receive(&input, exports: OneExport())
        #expect(handshake.output.starts(with: greeting))
        return (Array(handshake.output.dropFirst(greeting.count)), progress, input)
    }

    @Test func goAnswersWithTheExportAndEntersTransmission() {
        let result = run(
            flags
                + hex(
                    """
                    49484156454f5054 00000007 0000000e ; GO, 14 bytes
                    00000008 7262642f6469736b          ; name rbd/disk
                    0000                               ; no information asked for
                    2560951300                         ; the first bytes of a request
                    """))
        #expect(
            result.output
                == hex(
                    """
                    0003e889045565a9 00000007 00000003 0000000c ; REP_INFO
                    0000 0000000040000000 0d6d                  ; EXPORT, 1 GiB, flags
                    0003e889045565a9 00000007 00000003 0000000e ; REP_INFO
                    0003 00000200 00001000 02000000             ; BLOCK_SIZE 512, 4096, 32 MiB
                    0003e889045565a9 00000007 00000001 00000000 ; REP_ACK
                    """))
        #expect(
            result.progress
                == .transmission(Negotiated(export: OneExport.disk, structured: false, baseAllocation: false)))
        #expect(result.left == hex("2560951300"))
    }

    @Test func everyByteMayComeAlone() {
        var handshake = Handshake()
        let input =
            flags
            + hex("49484156454f5054 00000008 00000000 ; STRUCTURED_REPLY")
            + hex(
                """
                49484156454f5054 0000000a 00000022 ; SET_META_CONTEXT
                00000008 7262642f6469736b 00000001 ; rbd/disk, one query
                0000000f 626173653a616c6c6f636174696f6e
                """.replacing("00000022", with: "00000023"))
            + hex("49484156454f5054 00000007 0000000e 00000008 7262642f6469736b 0000")
        var pending: [UInt8] = []
        var progress = Handshake.Progress.needsMore
        for byte in input {
            #expect(progress == .needsMore)
            pending.append(byte)
            progress = handshake.receive(&pending, exports: OneExport())
        }
        #expect(
            progress == .transmission(Negotiated(export: OneExport.disk, structured: true, baseAllocation: true)))
    }

    @Test func exportNameAnswersWithoutAnOptionReply() {
        let result = run(flags + hex("49484156454f5054 00000001 00000008 7262642f6469736b"))
        #expect(result.output == hex("0000000040000000 0d6d"))
    }

    @Test func exportNamePadsForClientsThatWantZeroes() {
        let result = run(hex("00000001") + hex("49484156454f5054 00000001 00000008 7262642f6469736b"))
        #expect(result.output.count == 10 + 124)
    }

    @Test func exportNameOfNothingEndsTheSession() {
        let result = run(flags + hex("49484156454f5054 00000001 00000003 7a7a7a"))
        #expect(result.output.isEmpty)
        #expect(result.progress == .closed("no export 'zzz'"))
    }

    /// Option, its data, and the type of the one reply.
    @Test(arguments: [
        ("00000007 00000009 00000003 7a7a7a 0000", UInt32(0x8000_0006)),  // GO of an unknown name
        ("00000007 0000000e 00000008 7262642f68656c64 0000", 0x8000_0002),  // GO of a refused one
        ("00000007 00000005 00000003 7a", 0x8000_0003),  // GO that is too short
        ("00000006 0000000f 00000008 7262642f6469736b 000000", 0x8000_0003),  // INFO that is too long
        ("00000006 00000006 00001001 0000", 0x8000_0003),  // a name of 4097 bytes
        ("00000003 00000001 00", 0x8000_0003),  // LIST with data
        ("00000008 00000001 00", 0x8000_0003),  // STRUCTURED_REPLY with data
        ("0000000a 00000010 00000008 7262642f6469736b 00000000", 0x8000_0003),  // SET_META_CONTEXT too early
        ("00000005 00000000", 0x8000_0001),  // STARTTLS
        ("deadbeef 00000002 0000", 0x8000_0001),  // unknown
        ("00000002 00000000", 1),  // ABORT
    ])
    func oneReply(option: String, type: UInt32) {
        let result = run(flags + hex("49484156454f5054") + hex(option))
        let replied = result.output[12..<16].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        #expect(replied == type)
        let length = result.output[16..<20].reduce(0) { $0 << 8 | Int($1) }
        #expect(result.output.count == 20 + length)
        #expect(result.left.isEmpty)
    }

    @Test func aHugeOptionIsDrainedAndTheSessionStaysInStep() {
        let huge = hex("49484156454f5054 00000006 00020000") + [UInt8](repeating: 1, count: 0x20000)
        let result = run(flags + huge + hex("49484156454f5054 00000002 00000000"))
        let types = [12..<16, (result.output.count - 8)..<(result.output.count - 4)].map { range in
            result.output[range].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        }
        #expect(types == [0x8000_0009, 1])
        #expect(result.progress == .closed("the client aborted"))
    }

    @Test func aContextForAnotherExportIsNotSelected() {
        struct Two: ExportDirectory {
            func export(named name: String) -> ExportLookup {
                .found(Export(name: name, description: "", size: 512, readOnly: false, minimumBlock: 512))
            }
            func exportNames() -> [String] { ["a", "b"] }
        }
        var handshake = Handshake()
        var input =
            flags + hex("49484156454f5054 00000008 00000000")
            + hex("49484156454f5054 0000000a 0000001c 00000001 61 00000001 0000000f 626173653a616c6c6f636174696f6e")
            + hex("49484156454f5054 00000007 00000007 00000001 62 0000")
        let progress = handshake.receive(&input, exports: Two())
        guard case .transmission(let negotiated) = progress else {
            Issue.record("no transmission: \(progress)"); return
        }
        #expect(negotiated.structured && !negotiated.baseAllocation)
    }

    @Test func readOnlyExportsOfferNoWrites() {
        var export = OneExport.disk
        export.readOnly = true
        #expect(export.transmissionFlags(structured: true) == 0x058f)
    }
}
