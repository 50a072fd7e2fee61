import NBD
import Testing

/// Bytes as a little-endian machine has them.
@Suite struct KernelNetlinkTests {
    @Test func familyIsAskedForByName() {
        let message = GenericNetlink.getFamily("nbd").request(type: GenericNetlink.GENL_ID_CTRL, sequence: 7)
        #expect(
            message.encoded()
                == hex(
                    """
                    1c000000 1000 0500 07000000 00000000 ; 28 bytes, GENL_ID_CTRL, REQUEST | ACK, 7, to the kernel
                    03 01 0000                           ; CTRL_CMD_GETFAMILY, version 1
                    0800 0200 6e626400                   ; FAMILY_NAME "nbd"
                    """))
    }

    /// The controller's answer for nbd, as Linux 6.1 gives it.
    let newFamily = hex(
        """
        78000000 1000 0000 07000000 d2040000 ; 120 bytes, GENL_ID_CTRL
        01 02 0000                           ; CTRL_CMD_NEWFAMILY, version 2
        0800 0200 6e626400                   ; FAMILY_NAME "nbd"
        0600 0100 1c00 0000                  ; FAMILY_ID 28, padded
        0800 0300 01000000                   ; VERSION 1
        0800 0400 00000000                   ; HDRSIZE
        0800 0500 0a000000                   ; MAXATTR 10
        1800 0600                            ; OPS
          1400 0100                          ;   number 1
            0800 0100 01000000               ;     OP_ID CONNECT
            0800 0200 0a000000               ;     OP_FLAGS
        2400 0700                            ; MCAST_GROUPS
          2000 0100                          ;   number 1
            0800 0200 05000000               ;     GRP_ID 5
            1100 0100 6e62645f6d635f67726f757000 000000 ; GRP_NAME "nbd_mc_group", padded
        """)

    @Test func familyTellsItsNumber() throws {
        let messages = try NetlinkMessage.decode(newFamily)
        #expect(messages.count == 1)
        #expect(messages[0].port == 1234)
        let family = try GenericFamily(GenericMessage(messages[0]))
        #expect(family.name == "nbd" && family.id == 28 && family.version == 1)
    }

    @Test func anAnswerAndItsAcknowledgementMayShareADatagram() throws {
        let acknowledgement = hex(
            """
            24000000 0200 0001 07000000 d2040000 ; NLMSG_ERROR, CAPPED
            00000000                             ; success
            1c000000 1000 0500 07000000 00000000 ; of this request
            """)
        let messages = try NetlinkMessage.decode(newFamily + acknowledgement)
        #expect(messages.map(\.type) == [0x10, 2])
        let answer = try NetlinkAcknowledgement(messages[1])
        #expect(answer.code == 0 && answer.text == nil)
    }

    @Test func aRefusalSaysItsErrnoAndText() throws {
        let capped = hex(
            """
            3c000000 0200 0003 01000000 00000000 ; NLMSG_ERROR, CAPPED | ACK_TLVS
            feffffff                             ; -ENOENT
            1c000000 1000 0500 01000000 00000000
            0e00 0100 6e6f2066616d696c7900 0000  ; NLMSGERR_ATTR_MSG "no family", padded
            0800 0200 14000000                   ; NLMSGERR_ATTR_OFFS
            """)
        var answer = try NetlinkAcknowledgement(NetlinkMessage.decode(capped)[0])
        #expect(answer.code == 2 && answer.text == "no family")
        let whole = hex(
            """
            34000000 0200 0002 01000000 00000000 ; NLMSG_ERROR, ACK_TLVS
            f0ffffff                             ; -EBUSY
            15000000 1000 0500 01000000 00000000 ; the request, and its 5 bytes of payload, padded
            03 01 0000 ff 000000
            0700 0100 6e6f00 00                  ; "no"
            """)
        answer = try NetlinkAcknowledgement(NetlinkMessage.decode(whole)[0])
        #expect(answer.code == 16 && answer.text == "no")
    }

    @Test(arguments: [
        ("1c0000", "nlmsg_len"),  // not even a length
        ("0f000000 1000 0000 00000000 00000000", "nlmsg_len 15"),  // shorter than its header
        ("ffffffff 1000 0000 00000000 00000000", "nlmsg_len 4294967295 of 16"),
        ("14000000 1000 0000 00000000 00000000 0102", "nlmsg_len 20 of 18"),
    ])
    func aMessageWithAWrongLengthIsRefused(bytes: String, field: String) {
        let error = #expect(throws: NetlinkFormatError.self) { try NetlinkMessage.decode(hex(bytes)) }
        #expect(error == .truncated(field) || error == .invalid(field))
    }

    @Test(arguments: [
        ("0300 0100", "nla_len 3"),
        ("0000 0100", "nla_len 0"),  // would never end
        ("0900 0100 01000000", "nla_len 9 of 8"),
        ("0800 0100 01000000 04", "nla_len"),
        ("0800 0100 01000000 0400", "nla_type"),
    ])
    func anAttributeWithAWrongLengthIsRefused(bytes: String, field: String) {
        let error = #expect(throws: NetlinkFormatError.self) { try NetlinkAttribute.decode(hex(bytes)[...]) }
        #expect(error == .truncated(field) || error == .invalid(field))
    }

    @Test(arguments: [
        "00000000",  // no acknowledged header is fine without texts, this one has flags that promise it
        "01000000 1c000000 1000 0500 01000000 00000000",  // a positive errno
        "00f0ffff 1c000000 1000 0500 01000000 00000000",  // below every errno
        "00000080 1c000000 1000 0500 01000000 00000000",  // cannot even be negated
        "feffffff 0f000000 1000 0500 01000000 00000000",  // echoes less than a header
        "feffffff f0ffffff 1000 0500 01000000 00000000",  // echoes 4 GiB
    ])
    func aWrongAcknowledgementIsRefused(payload: String) {
        let message = NetlinkMessage(
            type: Netlink.NLMSG_ERROR, flags: Netlink.NLM_F_ACK_TLVS, sequence: 1, payload: hex(payload))
        #expect(throws: NetlinkFormatError.self) { try NetlinkAcknowledgement(message) }
    }

    @Test func noChangeOfAnyByteOfAnAnswerIsMoreThanAnError() {
        for position in newFamily.indices {
            for value in [0, 1, 3, 4, 0x7f, 0x80, 0xff] as [UInt8] {
                var bytes = newFamily
                bytes[position] = value
                for length in [bytes.count, position] {
                    guard let messages = try? NetlinkMessage.decode(Array(bytes.prefix(length))) else { continue }
                    for message in messages {
                        _ = try? NetlinkAcknowledgement(message)
                        guard let generic = try? GenericMessage(message) else { continue }
                        _ = try? GenericFamily(generic)
                        _ = try? generic.statusList()
                        _ = try? generic.index(of: generic.command)
                    }
                }
            }
        }
    }
}
