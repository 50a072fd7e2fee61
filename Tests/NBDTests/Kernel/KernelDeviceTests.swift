import EventLoop
import Glibc
import NBD
import Testing

@Suite struct KernelDeviceTests {
    let identifier = DeviceIdentifier(deviceID: 0, volume: "rbd/disk", cookie: 1)

    @Test func sysfsTellsAboutAConnectedDevice() throws {
        let root = try FakeRoot()
        root.device(3, backend: identifier.description, sectors: 2048, partitions: [1, 2, 10])
        root.write("/sys/block/nbd3/inflight", "       2        5\n")
        root.folder("/sys/block/nbd3/nbd3p2/holders/dm-4")
        root.folder("/sys/block/nbd3/mq/0")
        root.folder("/sys/block/nbd3/mq/1")
        let device = KernelDevice(index: 3, root: root.path)
        #expect(try device.exists)
        #expect(try device.isConnected)
        #expect(try !device.isReadOnly)
        #expect(try device.size == 1 << 20)
        #expect(try device.identifier == identifier)
        let inFlight = try device.inFlight
        #expect(inFlight.reads == 2 && inFlight.writes == 5)
        #expect(try device.partitions == ["nbd3p1", "nbd3p2", "nbd3p10"])
        #expect(try device.holders == ["dm-4"])
        #expect(try device.queues == 2)
        #expect(try !device.isFree)
    }

    @Test func aDeviceThatIsNotThereIsNothing() throws {
        let root = try FakeRoot()
        let device = KernelDevice(index: 0, root: root.path)
        #expect(try !device.exists)
        #expect(try !device.isConnected)
        #expect(try device.size == 0)
        #expect(try device.backend == nil)
        #expect(try device.partitions == [])
        #expect(try device.holders == [])
    }

    @Test func nonsenseInSysfsIsNotBelieved() throws {
        let root = try FakeRoot()
        root.device(0, backend: "", sectors: .max)
        root.write("/sys/block/nbd0/inflight", "x\n")
        let device = KernelDevice(index: 0, root: root.path)
        #expect(throws: SystemError.self) { try device.size }
        #expect(try device.backend == nil)
        #expect(throws: SystemError.self) { try device.inFlight }
    }

    /// What cannot be read is neither "no" nor 0.
    @Test func whatCannotBeReadIsAnErrorAndNotAbsence() throws {
        let root = try FakeRoot()
        let device = KernelDevice(index: 0, root: root.path)
        for file in ["size", "backend", "ro", "inflight"] {
            root.device(0, backend: identifier.description)
            root.spoil("/sys/block/nbd0/\(file)")
            let error = #expect(throws: SystemError.self, "\(file)") {
                _ = try (device.size, device.backend, device.isReadOnly, device.inFlight)
            }
            #expect(error?.code == EISDIR)
            #expect(error?.description.contains("/sys/block/nbd0/\(file)") == true, "it says what")
            root.delete("/sys/block/nbd0")
        }
        for folder in ["holders", "mq"] {
            root.device(0)
            root.delete("/sys/block/nbd0/\(folder)")
            root.write("/sys/block/nbd0/\(folder)", "")
            let error = #expect(throws: SystemError.self, "\(folder)") { _ = try (device.holders, device.queues) }
            #expect(error?.code == ENOTDIR)
            root.delete("/sys/block/nbd0")
        }
        root.device(0)
        root.disconnect(0)
        root.link("/sys/block/nbd0/pid", "pid")
        let error = #expect(throws: SystemError.self) { try device.isConnected }
        #expect(error?.code == ELOOP)
        #expect(throws: SystemError.self) { try device.waitUntilFree(0) }
    }

    @Test func aDeviceThatWasNotSeenIsNotKnownToBeGone() throws {
        let root = try FakeRoot()
        root.device(0, backend: "somebody else's")
        root.spoil("/sys/block/nbd0/backend")
        root.device(1, backend: identifier.description)
        #expect(try KernelDevice.find(identifier, root: root.path)?.index == 1, "it may be found all the same")
        let other = DeviceIdentifier(deviceID: 0, volume: "rbd/disk", cookie: 2)
        #expect(throws: SystemError.self) { try KernelDevice.find(other, root: root.path) }
        #expect(throws: SystemError.self) { try KernelDevice.ours(root: root.path) }
        root.delete("/sys/block")
        let error = #expect(throws: SystemError.self, "where there is no /sys nothing is known") {
            try KernelDevice.all(root: root.path)
        }
        #expect(error?.code == ENOENT)
        root.write("/sys/block", "")
        #expect(throws: SystemError.self) { try KernelDevice.all(root: root.path) }
    }

    @Test func aDeviceThatCannotBeLookedAtIsNotChanged() throws {
        let root = try FakeRoot()
        root.device(0)
        root.spoil("/sys/block/nbd0/backend")
        let error = #expect(throws: KernelDeviceError.self) {
            try KernelDevices(root: root.path).disconnect(index: 0, identifier: identifier.description)
        }
        #expect(error?.code == EISDIR)
    }

    @Test func devicesAreFoundByWhatTheyCarryAndNeverByTheirNumber() throws {
        let root = try FakeRoot()
        root.device(0, backend: "somebody else's")
        root.device(1)
        root.device(10, backend: identifier.description)
        root.device(2, backend: "qbd:1:rbd/other:0000000000000002")
        root.folder("/sys/block/nbdx")
        root.folder("/sys/block/sda")
        #expect(try KernelDevice.all(root: root.path).map(\.index) == [0, 1, 2, 10])
        #expect(try KernelDevice.find(identifier, root: root.path)?.index == 10)
        let sameNameAnotherLife = DeviceIdentifier(deviceID: 0, volume: "rbd/disk", cookie: 2)
        #expect(try KernelDevice.find(sameNameAnotherLife, root: root.path) == nil)
        let ours = try KernelDevice.ours(root: root.path)
        #expect(ours.map(\.device.index) == [2, 10])
        #expect(ours.map(\.identifier.volume) == ["rbd/other", "rbd/disk"])
    }

    @Test func aDeviceIsFreeWhenTheDriverHasLetGo() throws {
        let root = try FakeRoot()
        root.device(0, backend: identifier.description)
        let device = KernelDevice(index: 0, root: root.path)
        #expect(try !device.waitUntilFree(0.02))
        root.disconnect(0)
        root.write("/sys/block/nbd0/inflight", "0 1\n")
        #expect(try !device.waitUntilFree(0))
        root.write("/sys/block/nbd0/inflight", "0 0\n")
        root.folder("/sys/block/nbd0/holders/md127")
        #expect(try !device.waitUntilFree(0))
        root.delete("/sys/block/nbd0/holders/md127")
        #expect(try device.waitUntilFree(0))
    }

    @Test func aPathLeadsToItsDevice() throws {
        let root = try FakeRoot()
        root.device(7, partitions: [1])
        root.link("/dev/qbd0", "nbd7")
        root.link("/dev/qbd/rbd/disk", "../../nbd7")
        root.link("/dev/qbd0p1", "nbd7p1")
        root.write("/tmp/nbd7", "")
        for path in ["nbd7", "/dev/nbd7", "/dev/qbd0", "/dev/qbd/rbd/disk"] {
            #expect(KernelDevice(path: path, root: root.path)?.index == 7, "\(path)")
        }
        #expect(KernelDevice(path: "/dev/nbd200", root: root.path)?.index == 200, "it need not be there")
        for path in ["/dev/qbd1", "/dev/qbd0p1", "/dev/nbd7p1", "/tmp/nbd7", "/dev/nbd07", "/dev/nbd", "", "/", "sda"] {
            #expect(KernelDevice(path: path, root: root.path) == nil, "\(path)")
        }
    }

    @Test func nothingIsDoneToADeviceOfSomebodyElse() throws {
        let root = try FakeRoot()
        root.device(0, backend: "qbd:0:rbd/disk:00000000000000ff")
        root.device(1)
        let devices = KernelDevices(root: root.path)
        for index in [0, 1, 2] as [UInt32] {
            let text = identifier.description
            var error = #expect(throws: KernelDeviceError.self) {
                try devices.disconnect(index: index, identifier: text)
            }
            #expect(error?.code == ENODEV)
            #expect(error?.message.contains("/dev/nbd\(index) is not ours to change") == true)
            error = #expect(throws: KernelDeviceError.self) {
                try devices.reconfigure(KernelReconfigure(index: index, identifier: text))
            }
            #expect(error?.code == ENODEV)
        }
    }

    @Test func queueSettingsAreWrittenAndWhatFailsIsSaid() throws {
        let root = try FakeRoot()
        root.device(0)
        let queue = "/sys/block/nbd0/queue"
        root.write("\(queue)/scheduler", "")
        root.write("\(queue)/rotational", "1\n")
        root.write("\(queue)/max_hw_sectors_kb", "32768\n")
        root.write("\(queue)/max_sectors_kb", "")
        root.write("\(queue)/io_timeout", "")
        let settings = QueueSettings(KernelDevice(index: 0, root: root.path))
        #expect(settings.apply(resendInterval: 2000) == [])
        let written = ["scheduler", "rotational", "max_sectors_kb", "io_timeout"].map { name in
            root.text("\(queue)/\(name)")?.split(whereSeparator: \.isNewline).first.map { String($0) }
        }
        #expect(written == ["none", "0", "32768", "2000"])
        root.delete("\(queue)/scheduler")
        let problems = settings.apply(resendInterval: 2000)
        #expect(problems.count == 1)
        #expect(problems.first?.contains("scheduler") == true)
    }

    @Test(
        arguments: [
            .settle(size: 1 << 40, readOnly: true, resendInterval: 2000),
            .settle(size: nil, readOnly: false, resendInterval: nil),
            .setResendInterval(30_000), .grow(to: 1 << 20), .rescanPartitions, .dropPartitions, .claim(flush: true),
            .claim(flush: false),
        ] as [DeviceWork]) func workIsTheSameFromItsWords(_ work: DeviceWork)
    {
        #expect(DeviceWork(words: work.words) == work)
    }

    @Test(arguments: [
        [], ["settle"], ["settle", "x", "true", "-"], ["grow", "-"], ["grow", "1", "2"], ["claim", "1"],
    ])
    func wordsOfNoWorkAreNone(_ words: [String]) {
        #expect(DeviceWork(words: words) == nil)
    }
}
