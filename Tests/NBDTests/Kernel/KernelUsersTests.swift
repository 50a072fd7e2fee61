import EventLoop
import Glibc
import NBD
import Testing

@Suite struct KernelUsersTests {
    @Test func mountinfoIsReadWithAllItsOddities() {
        let table = Mount.table(
            """
            22 27 0:21 / /proc rw,relatime - proc proc rw
            36 35 43:1 / /mnt/with\\040blank rw,noatime master:1 shared:7 - ext4 /dev/nbd0p1 rw,errors=continue
            37 35 0:55 / /mnt/b\\134s rw - btrfs /dev/nbd1 rw
            38 35 43:0 / /mnt/none rw - xfs
            broken
            39 35 43:2 / /a rw propagate_from:2 ext4 /dev/nbd0p2 rw,x
            """)
        #expect(table.map(\.number) == ["0:21", "43:1", "0:55"])
        #expect(table.map(\.mountPoint) == ["/proc", "/mnt/with blank", "/mnt/b\\s"])
        #expect(table.map(\.type) == ["proc", "ext4", "btrfs"])
        #expect(table.map(\.source) == ["proc", "/dev/nbd0p1", "/dev/nbd1"])
    }

    @Test func swapsAreReadWithoutTheirHeading() {
        let table = Swap.table(
            """
            Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
            /dev/nbd0p2                             partition\t1048572\t\t0\t\t-2
            /swap\\040file                           file\t\t1024\t\t0\t\t-3
            """)
        #expect(table.map(\.path) == ["/dev/nbd0p2", "/swap file"])
        #expect(table.map(\.type) == ["partition", "file"])
    }

    @Test func everyKindOfUserIsNamed() throws {
        let root = try FakeRoot()
        root.device(0, partitions: [1, 2, 3])
        root.device(1)
        let other = "30 1 43:32 / /other rw - ext4 /dev/nbd1 rw\n"
        root.write("/proc/self/mountinfo", other + "31 1 43:1 / /mnt/a rw - ext4 /dev/nbd0p1 rw\n")
        root.link("/proc/self/ns/mnt", "mnt:[1]")
        root.write("/proc/1/mountinfo", "31 1 43:1 / /mnt/a rw - ext4 /dev/nbd0p1 rw\n")
        root.link("/proc/1/ns/mnt", "mnt:[1]")
        root.write("/proc/77/mountinfo", "91 1 43:1 / /data rw - ext4 /dev/nbd0p1 rw\n")
        root.write("/proc/77/comm", "postgres\n")
        root.link("/proc/77/ns/mnt", "mnt:[2]")
        root.write("/proc/78/mountinfo", "91 1 43:1 / /data rw - ext4 /dev/nbd0p1 rw\n")
        root.link("/proc/78/ns/mnt", "mnt:[2]")
        root.write("/proc/swaps", "Filename Type Size Used Priority\n/dev/nbd0p2 partition 10 0 -2\n")
        root.folder("/sys/block/nbd0/holders/md127")
        root.folder("/sys/block/md127/md")
        root.folder("/sys/block/nbd0/nbd0p3/holders/dm-3")
        root.write("/sys/block/dm-3/dm/name", "vg-data\n")
        root.write("/sys/block/loop4/loop/backing_file", "/dev/nbd0\n")
        root.write("/proc/812/comm", "fio\n")
        root.link("/proc/812/fd/3", "/dev/nbd0")
        root.link("/proc/812/fd/4", "/dev/nbd0")
        root.write("/proc/813/comm", "qbdd\n")
        root.link("/proc/813/fd/3", "/dev/nbd0")
        root.write("/proc/814/comm", "bash\n")
        root.link("/proc/814/fd/0", "/dev/nbd1")
        root.link("/proc/814/fd/1", "socket:[5]")
        let users = try DeviceUsers(KernelDevice(index: 0, root: root.path))
        #expect(
            try users.phrases(except: 813) == [
                "mounted at /mnt/a", "mounted at /data for process 77 (postgres)", "swap on /dev/nbd0p2",
                "held by device mapper volume vg-data (dm-3)", "held by RAID array md127", "used by loop device loop4",
                "open in process 812 (fio)",
            ])
    }

    /// A container has a /dev of its own. Only root can make such a node.
    @Test(.enabled(if: canMakeNodes)) func aNodeSomewhereElseIsKnownByItsNumber() throws {
        let root = try FakeRoot()
        root.device(0)
        root.folder("/container/dev")
        for (name, type, minor) in [("disk", S_IFBLK, 0), ("other", S_IFBLK, 32), ("character", S_IFCHR, 0)] {
            #expect(mknod("\(root.path)/container/dev/\(name)", type | 0o600, dev_t(43 << 8 | minor)) == 0)
        }
        for (process, name) in [(700, "disk"), (701, "other"), (702, "character"), (703, "missing")] {
            root.write("/proc/\(process)/comm", "\(name)\n")
            root.link("/proc/\(process)/fd/3", "\(root.path)/container/dev/\(name)")
        }
        let users = try DeviceUsers(KernelDevice(index: 0, root: root.path))
        #expect(try users.phrases() == ["open in process 700 (disk)"])
    }

    private static var canMakeNodes: Bool {
        let path = "/tmp/qbd-node-\(getpid())"
        defer { unlink(path) }
        return mknod(path, S_IFBLK | 0o600, dev_t(43 << 8)) == 0
    }

    @Test func aFileSystemWithANumberOfItsOwnIsFoundByItsSource() throws {
        let root = try FakeRoot()
        root.device(0)
        root.write(
            "/proc/self/mountinfo",
            "31 1 0:50 / /a rw - btrfs /dev/qbd0 rw\n32 1 0:51 / /b rw - btrfs /dev/qbd1 rw\n")
        let users = try DeviceUsers(KernelDevice(index: 0, root: root.path), names: ["/dev/qbd0", "/dev/qbd/rbd/disk"])
        #expect(try users.phrases() == ["mounted at /a"])
    }

    @Test func manyProcessesAreCounted() throws {
        let root = try FakeRoot()
        root.device(0)
        for process in 100..<120 {
            root.write("/proc/\(process)/comm", "cat\n")
            root.link("/proc/\(process)/fd/0", "/dev/nbd0")
        }
        let phrases = try DeviceUsers(KernelDevice(index: 0, root: root.path)).phrases()
        #expect(phrases.count == 9)
        #expect(phrases.first == "open in process 100 (cat)")
        #expect(phrases.last == "open in 12 more processes")
    }

    /// A daemon that was killed leaves its own behind.
    @Test func aProcessThatWorksOnTheDeviceForTheDaemonIsNoUser() throws {
        let root = try FakeRoot()
        root.device(0)
        for (process, name, index) in [(100, "qbdd:device", 0), (101, "qbdd:device", 1), (102, "qbdd", 0)] {
            root.write("/proc/\(process)/comm", "\(name)\n")
            root.write("/proc/\(process)/cmdline", "qbdd\0--device-work\0\(index)\0qbd:x\0rescan-partitions\0")
            root.link("/proc/\(process)/fd/3", "/dev/nbd0")
        }
        let users = try DeviceUsers(KernelDevice(index: 0, root: root.path))
        #expect(try users.phrases() == ["open in process 101 (qbdd:device)", "open in process 102 (qbdd)"])
        #expect(try users.hasWorker)
        #expect(try !DeviceUsers(KernelDevice(index: 2, root: root.path)).hasWorker)
    }

    /// Unreadable is not "nobody": a mounted device would be unmapped.
    @Test(arguments: [
        "/proc/self/mountinfo", "/proc/swaps", "/proc/300/mountinfo", "/proc/300/comm",
        "/sys/block/loop4/loop/backing_file", "/sys/block/dm-1/dm/name", "/sys/block/nbd0/nbd0p1/dev",
    ])
    func aLookThatFailsIsAnError(file: String) throws {
        let root = try FakeRoot()
        root.device(0, partitions: [1])
        root.folder("/sys/block/nbd0/holders/dm-1")
        root.link("/proc/300/ns/mnt", "mnt:[2]")
        root.spoil(file)
        let error = #expect(throws: SystemError.self) {
            _ = try DeviceUsers(KernelDevice(index: 0, root: root.path)).phrases()
        }
        #expect(error?.description.contains(file) == true)
    }

    @Test(arguments: ["/proc/self/mountinfo", "/proc", "/sys/block"])
    func withoutWhatIsAlwaysThereNothingIsKnown(missing: String) throws {
        let root = try FakeRoot()
        root.device(0)
        let users = try DeviceUsers(KernelDevice(index: 0, root: root.path))
        root.delete(missing)
        #expect(throws: SystemError.self) { _ = try users.phrases() }
    }

    @Test func aDeviceNobodyUsesHasNoUsers() throws {
        let root = try FakeRoot()
        root.device(0)
        #expect(try DeviceUsers(KernelDevice(index: 0, root: root.path)).phrases() == [])
    }
}
