import NBD
import Testing

/// Bytes as a little-endian machine has them; numbers from linux/nbd-netlink.h.
@Suite struct KernelMessageTests {
    @Test func connectCarriesWhatMakesADevice() {
        let connect = KernelConnect(
            index: 5, sockets: [7, 8], size: 1 << 30, blockSize: 4096, serverFlags: 0x016d,
            deadConnectionTimeout: 120, identifier: "qbd:0:rbd/disk:00000000deadbeef")
        #expect(
            connect.message.request(type: 28, sequence: 1).encoded()
                == hex(
                    """
                    a4000000 1c00 0500 01000000 00000000 ; 164 bytes, the family, REQUEST | ACK, 1, to the kernel
                    01 01 0000                           ; NBD_CMD_CONNECT, version 1
                    0800 0100 05000000                   ; INDEX
                    0c00 0200 0000004000000000           ; SIZE_BYTES
                    0c00 0300 0010000000000000           ; BLOCK_SIZE_BYTES
                    0c00 0400 0000000000000000           ; TIMEOUT: none
                    0c00 0500 6d01000000000000           ; SERVER_FLAGS
                    0c00 0600 0000000000000000           ; CLIENT_FLAGS
                    0c00 0800 7800000000000000           ; DEAD_CONN_TIMEOUT
                    1c00 0780                            ; SOCKETS, NESTED
                      0c00 0180 0800 0100 07000000       ;   SOCK_ITEM, NESTED: SOCK_FD
                      0c00 0180 0800 0100 08000000
                    2400 0a00                            ; BACKEND_IDENTIFIER, with its zero
                      7162643a303a7262642f6469736b3a303030303030303064656164626565 6600
                    """))
    }

    @Test func connectWithoutAnIndexLeavesItToTheKernel() {
        var connect = KernelConnect(
            index: nil, sockets: [], size: 0, blockSize: 512, serverFlags: 0, deadConnectionTimeout: 0, identifier: "")
        #expect(connect.message.attributes.starts(with: hex("0c00 0200")))
        connect.index = 0
        #expect(connect.message.attributes.starts(with: hex("0800 0100 00000000 0c00 0200")))
    }

    @Test func reconfigureChangesOnlyWhatItNames() {
        var reconfigure = KernelReconfigure(index: 3, identifier: "qbd:x")
        #expect(
            reconfigure.message.attributes
                == hex(
                    """
                    0800 0100 03000000               ; INDEX
                    0a00 0a00 7162643a7800 0000      ; BACKEND_IDENTIFIER "qbd:x", padded
                    """))
        #expect(reconfigure.message.command == 3 && reconfigure.message.version == 1)
        reconfigure.sockets = [9]
        reconfigure.deadConnectionTimeout = 1
        #expect(
            reconfigure.message.attributes
                == hex(
                    """
                    0800 0100 03000000
                    0c00 0800 0100000000000000       ; DEAD_CONN_TIMEOUT
                    1000 0780                        ; SOCKETS
                      0c00 0180 0800 0100 09000000
                    0a00 0a00 7162643a7800 0000
                    """))
        var grown = KernelReconfigure(index: 3, identifier: "qbd:x")
        grown.size = 0x1_0000_0000
        #expect(
            grown.message.attributes
                == hex("0800 0100 03000000  0c00 0200 0000000001000000  0a00 0a00 7162643a7800 0000"))
    }

    @Test func disconnectAndStatusNameTheDevice() {
        #expect(GenericMessage.disconnect(index: 2).command == 2)
        #expect(GenericMessage.disconnect(index: 2).attributes == hex("0800 0100 02000000"))
        #expect(GenericMessage.status(index: nil).command == 5)
        #expect(GenericMessage.status(index: nil).attributes == [])
        #expect(GenericMessage.status(index: 4).attributes == hex("0800 0100 04000000"))
    }

    @Test func connectIsAnsweredWithTheIndex() throws {
        let answer = GenericMessage(command: 1, version: 1, attributes: hex("0800 0100 0b000000"))
        #expect(try answer.index(of: KernelNBD.NBD_CMD_CONNECT) == 11)
        #expect(throws: NetlinkFormatError.self) { try answer.index(of: KernelNBD.NBD_CMD_STATUS) }
    }

    @Test func statusListsDevices() throws {
        let answer = GenericMessage(
            command: 5, version: 1,
            attributes: hex(
                """
                2c00 0900                                       ; DEVICE_LIST
                  1400 0100 0800 0100 00000000 0500 0200 01 000000 ; DEVICE_ITEM: INDEX 0, CONNECTED 1, padded
                  1400 0100 0800 0100 01000000 0500 0200 00 000000
                """))
        let list = try answer.statusList()
        #expect(list.map(\.index) == [0, 1])
        #expect(list.map(\.inUse) == [true, false])
    }

    @Test(arguments: [
        "",  // no list
        "0c00 0900 0800 0100 00000000",  // an item without its fields
        "1800 0900 1400 0100 0600 0100 0000 0000 0500 0200 01 000000",  // an index of 2 bytes
        "1400 0900 1400 0100 0800 0100 00000000",  // an item longer than the list
    ])
    func aWrongStatusIsRefused(attributes: String) {
        let answer = GenericMessage(command: 5, version: 1, attributes: hex(attributes))
        #expect(throws: NetlinkFormatError.self) { try answer.statusList() }
    }

    @Test func anIdentifierIsReadAsItIsWritten() throws {
        let identifier = DeviceIdentifier(deviceID: 12, volume: "rbd/disk-1.x_", cookie: 0xdead_beef)
        #expect(identifier.description == "qbd:12:rbd/disk-1.x_:00000000deadbeef")
        #expect(DeviceIdentifier(identifier.description) == identifier)
        let made = DeviceIdentifier(deviceID: 0, volume: "a/b")
        #expect(made.cookie != 0)
        #expect(DeviceIdentifier(made.description) == made)
    }

    @Test(arguments: [
        "", "qbd:", "ceph", "qbd:0:a/b", "qbd:0:a/b:123", "rbd:0:a/b:00000000deadbeef", "qbd:0:ab:00000000deadbeef",
        "qbd:0:a/b/c:00000000deadbeef", "qbd:0:a/..:00000000deadbeef", "qbd:0:/b:00000000deadbeef",
        "qbd:-1:a/b:00000000deadbeef", "qbd:01:a/b:00000000deadbeef", "qbd:0:a/b c:00000000deadbeef",
        "qbd:0:a/b:00000000DEADBEEF", "qbd:0:a/b:00000000deadbeeg", "qbd:0:a/b:00000000deadbeef:",
        "qbd:4294967296:a/b:00000000deadbeef", "qbd:0:a/ü:00000000deadbeef", "qbd:0:a/b:+000000deadbeef1",
    ])
    func anythingElseIsNotOurs(text: String) {
        #expect(DeviceIdentifier(text) == nil)
    }
}
