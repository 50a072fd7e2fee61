import NBD
import Testing

@Suite struct KernelEventTests {
    private func event(_ fields: String...) -> KernelEvent? {
        KernelEvent(fields.joined(separator: "\0").utf8)
    }

    @Test func aPartitionSpeaksForItsDisk() {
        let event = event(
            "add@/devices/virtual/block/nbd3/nbd3p1", "ACTION=add", "DEVPATH=/devices/virtual/block/nbd3/nbd3p1",
            "SUBSYSTEM=block", "MAJOR=43", "MINOR=97", "DEVNAME=nbd3p1", "DEVTYPE=partition", "SEQNUM=1234")
        #expect(event?.index == 3)
        #expect(event?.action == "add")
    }

    @Test(arguments: ["sda", "nbd", "nbdx", "nbd3q1", "nbd3p", "nbd3px", "nbd99999999999"])
    func othersAreNotOurs(name: String) {
        #expect(event("change@/x", "ACTION=change", "SUBSYSTEM=block", "DEVNAME=\(name)") == nil)
    }

    @Test func garbageIsNoEvent() {
        #expect(KernelEvent([UInt8]()) == nil)
        #expect(KernelEvent([UInt8](repeating: 0, count: 64)) == nil)
        #expect(KernelEvent("libudev\0\u{fe}\u{ed}ACTION=add".utf8) == nil)
        #expect(KernelEvent([0xff, 0xfe, 0x3d, 0x00, 0xff]) == nil)
    }
}
