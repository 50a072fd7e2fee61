import EventLoop
import Glibc
import NBD
import Testing

@Suite struct KernelNamesTests {
    let identifier = DeviceIdentifier(deviceID: 0, volume: "rbd/disk", cookie: 1)

    private func setUp(partitions: [Int] = []) throws -> (FakeRoot, KernelDevice, DeviceNames) {
        let root = try FakeRoot()
        root.device(5, backend: identifier.description, partitions: partitions)
        return (root, KernelDevice(index: 5, root: root.path), DeviceNames(root: root.path, udevTimeout: 0.2))
    }

    @Test func withoutUdevTheNamesAreMadeAndRemovedHere() throws {
        let (root, device, names) = try setUp(partitions: [1, 12])
        #expect(try names.make(device, identifier) == [])
        #expect(root.target("/dev/qbd0") == "nbd5")
        #expect(root.target("/dev/qbd/rbd/disk") == "../../nbd5")
        #expect(root.target("/dev/qbd0p1") == "nbd5p1")
        #expect(root.target("/dev/qbd0p12") == "nbd5p12")
        #expect(
            try DeviceNames.paths(device, identifier)
                == ["/dev/qbd0", "/dev/qbd/rbd/disk", "/dev/qbd0p1", "/dev/qbd0p12"])
        #expect(try names.make(device, identifier) == [], "twice is as good as once")
        root.disconnect(5)
        #expect(names.remove(device, identifier) == [])
        #expect(root.list("/dev") == ["nbd5", "nbd5p1", "nbd5p12"], "no link and no empty folder is left")
    }

    @Test(arguments: [nil, "qbd:0:rbd/disk:0000000000000002"])
    func aDeviceThatIsAnotherOneNowGetsNoNames(backend: String?) throws {
        let (root, device, names) = try setUp()
        root.disconnect(5)
        if let backend { root.device(5, backend: backend) }
        let error = #expect(throws: SystemError.self) { _ = try names.make(device, identifier) }
        #expect(error?.code == ENODEV)
        #expect(root.list("/dev") == ["nbd5"])
    }

    /// A snapshot's name may be longer than that of a file can be.
    @Test func aVolumeWithoutANameBelowDevHasItsNumberAllTheSame() throws {
        let root = try FakeRoot()
        let long = String(repeating: "v", count: 128)
        let identifier = DeviceIdentifier(deviceID: 3, volume: "\(long)/\(long)@\(long)", cookie: 1)
        root.device(5, backend: identifier.description)
        let (device, names) = (KernelDevice(index: 5, root: root.path), DeviceNames(root: root.path))
        #expect(try names.make(device, identifier).count == 1, "it is said")
        #expect(root.target("/dev/qbd3") == "nbd5")
        #expect(names.remove(device, identifier) == [])
        #expect(root.list("/dev") == ["nbd5"])
        let fitting = DeviceIdentifier(deviceID: 3, volume: "\(long)/\(long)", cookie: 1)
        root.device(5, backend: fitting.description)
        #expect(try names.make(device, fitting) == [])
        #expect(root.target("/dev/qbd/\(long)/\(long)") == "../../nbd5")
    }

    /// Names of a device that may be ours again stay.
    @Test func aNameStaysWhenItCannotBeToldWhoseItIs() throws {
        let (root, device, names) = try setUp()
        _ = try names.make(device, identifier)
        root.spoil("/sys/block/nbd5/backend")
        #expect(names.remove(identifier).count == 2, "said for each name")
        #expect(root.target("/dev/qbd0") == "nbd5")
        let error = #expect(throws: SystemError.self) { _ = try names.make(device, identifier) }
        #expect(error?.code == EISDIR)
    }

    @Test func foldersWithOtherVolumesStay() throws {
        let (root, device, names) = try setUp()
        root.link("/dev/qbd/rbd/other", "../../nbd6")
        _ = try names.make(device, identifier)
        _ = names.remove(device, identifier)
        #expect(root.list("/dev/qbd/rbd") == ["other"])
    }

    @Test func aLinkLeftFromBeforeIsReplaced() throws {
        let (root, device, names) = try setUp(partitions: [1])
        root.link("/dev/qbd0", "nbd9")
        root.link("/dev/qbd0p1", "nbd9p1")
        root.link("/dev/qbd0p2", "nbd9p2")
        root.link("/dev/qbd/rbd/disk", "../../nbd9")
        _ = try names.make(device, identifier)
        #expect(root.target("/dev/qbd0") == "nbd5")
        #expect(root.target("/dev/qbd/rbd/disk") == "../../nbd5")
        #expect(
            root.list("/dev") == ["nbd5", "nbd5p1", "qbd", "qbd0", "qbd0p1"], "a partition that is gone has no name")
    }

    @Test(arguments: ["/dev/sda", "nbd5x", "../nbd5", "sda", "nbd", "../../../nbd5", "nbd5p"])
    func aLinkThatIsNotOursIsNeitherReplacedNorRemoved(target: String) throws {
        let (root, device, names) = try setUp()
        root.link("/dev/qbd0", target)
        let error = #expect(throws: (any Error).self) { _ = try names.make(device, identifier) }
        #expect("\(try #require(error))".contains("not ours"))
        _ = names.remove(device, identifier)
        #expect(root.target("/dev/qbd0") == target)
    }

    @Test func aFileIsNeitherReplacedNorRemoved() throws {
        let (root, device, names) = try setUp()
        root.write("/dev/qbd/rbd/disk", "precious")
        #expect(throws: (any Error).self) { _ = try names.make(device, identifier) }
        _ = names.remove(device, identifier)
        #expect(root.text("/dev/qbd/rbd/disk") == "precious")
    }

    @Test func namesThatPointToAnotherDeviceStay() throws {
        let (root, device, names) = try setUp()
        root.link("/dev/qbd0", "nbd6")
        root.link("/dev/qbd0p1", "nbd6p1")
        _ = names.remove(device, identifier)
        #expect(root.target("/dev/qbd0") == "nbd6")
        #expect(root.target("/dev/qbd0p1") == "nbd6p1")
    }

    @Test func aVolumeMayHaveTheNameOfAPartition() throws {
        let (root, device, names) = try setUp()
        root.link("/dev/qbd0p", "nbd5")
        root.link("/dev/qbd0px", "nbd5")
        _ = try names.make(device, identifier)
        _ = names.remove(device, identifier)
        #expect(root.target("/dev/qbd0p") == "nbd5" && root.target("/dev/qbd0px") == "nbd5")
    }

    // MARK: With udev

    private func addUdev(_ root: FakeRoot, links: String) {
        root.write("/run/udev/control", "")
        root.write("/usr/lib/udev/rules.d/60-qbd.rules", "")
        root.write("/run/udev/data/b43:160", "S:disk/by-id/x\n\(links)I:123\nE:DEVTYPE=disk\n")
    }

    @Test func whatUdevHasNamedIsNotWaitedFor() throws {
        let (root, device, names) = try setUp()
        addUdev(root, links: "S:qbd0\nS:qbd/rbd/disk\n")
        root.link("/dev/qbd0", "nbd5")
        #expect(try names.make(device, identifier) == [])
        #expect(root.target("/dev/qbd/rbd/disk") == "../../nbd5", "what udev forgot is made all the same")
    }

    @Test func whatUdevDoesNotNameInTimeIsNamedHereWithARemark() throws {
        let (root, device, names) = try setUp()
        addUdev(root, links: "S:qbd0\n")
        let remarks = try names.make(device, identifier)
        #expect(remarks.count == 1 && remarks.first?.contains("udev did not name /dev/nbd5") == true)
        #expect(root.target("/dev/qbd0") == "nbd5")
    }

    @Test func udevIsAskedToLookAgainWhenItWasTooEarly() throws {
        let (root, device, _) = try setUp()
        addUdev(root, links: "")
        root.write("/sys/block/nbd5/uevent", "")
        nonisolated(unsafe) let shared = root
        let udev = try Thread(name: "udev") {
            let late = Deadline(seconds: 30)
            while shared.text("/sys/block/nbd5/uevent") != "change", !late.passed { usleep(1000) }
            shared.write("/run/udev/data/b43:160", "S:qbd0\nS:qbd/rbd/disk\n")
        }
        let names = DeviceNames(root: root.path, udevTimeout: 20, udevPatience: 0.01)
        #expect(try names.make(device, identifier, asksUdev: true) == [])
        #expect(root.target("/dev/qbd0") == "nbd5")
        udev.join()
    }

    @Test func udevIsNotAskedForNothing() throws {
        let (root, device, names) = try setUp()
        addUdev(root, links: "S:qbd0\nS:qbd/rbd/disk\n")
        root.write("/sys/block/nbd5/uevent", "untouched")
        #expect(try names.make(device, identifier, asksUdev: true) == [])
        addUdev(root, links: "")
        #expect(try names.make(device, identifier).count == 1)
        #expect(root.text("/sys/block/nbd5/uevent") == "untouched")
    }

    @Test func whyUdevCannotBeAskedIsTold() throws {
        let (root, device, names) = try setUp()
        addUdev(root, links: "")
        let remarks = try names.make(device, identifier, asksUdev: true)
        #expect(remarks.count == 1 && remarks.first?.contains("/sys/block/nbd5/uevent") == true)
        #expect(root.target("/dev/qbd0") == "nbd5")
    }

    @Test func whatUdevDoesNotForgetInTimeIsRemovedHereWithARemark() throws {
        let (root, device, names) = try setUp()
        _ = try names.make(device, identifier)
        addUdev(root, links: "S:qbd0\nS:qbd/rbd/disk\n")
        root.disconnect(5)
        let remarks = names.remove(device, identifier)
        #expect(remarks.count == 1 && remarks.first?.contains("udev did not forget /dev/nbd5") == true)
        #expect(root.target("/dev/qbd0") == nil)
    }

    @Test func udevWithoutOurRulesIsNotWaitedFor() throws {
        let (root, device, names) = try setUp()
        root.write("/run/udev/control", "")
        #expect(try names.make(device, identifier) == [])
    }
}
