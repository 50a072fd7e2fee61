import NBD
import Testing

@Suite struct KernelEventTests {
    private func event(_ fields: [String]) -> KernelEvent? {
        KernelEvent(fields.flatMap { Array($0.utf8) + [0] })
    }

    @Test func partitionsAndDisksAreTold() {
        let partition = event([
            "add@/devices/virtual/block/nbd12/nbd12p3", "ACTION=add", "DEVPATH=/devices/virtual/block/nbd12/nbd12p3",
            "SUBSYSTEM=block", "MAJOR=43", "MINOR=387", "DEVNAME=nbd12p3", "DEVTYPE=partition", "SEQNUM=1203",
        ])
        #expect(partition?.action == "add" && partition?.index == 12 && partition?.partition == 3)
        let disk = event(["change@/devices/virtual/block/nbd0", "SUBSYSTEM=block", "DEVNAME=nbd0"])
        #expect(disk?.action == "change" && disk?.index == 0 && disk?.partition == nil)
    }

    @Test(arguments: [
        [],
        ["libudev"],
        ["add@/x", "SUBSYSTEM=block", "DEVNAME=sda"],
        ["add@/x", "SUBSYSTEM=net", "DEVNAME=nbd0"],
        ["add@/x", "SUBSYSTEM=block", "DEVNAME=nbd"],
        ["add@/x", "SUBSYSTEM=block", "DEVNAME=nbd0p"],
        ["add@/x", "SUBSYSTEM=block", "DEVNAME=nbd0p1p2"],
        ["add@/x", "SUBSYSTEM=block", "DEVNAME=nbd99999999999"],
        ["no at", "SUBSYSTEM=block", "DEVNAME=nbd0"],
    ])
    func everythingElseIsNot(fields: [String]) {
        #expect(event(fields) == nil)
    }
}
