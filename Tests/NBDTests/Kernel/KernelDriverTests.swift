import Glibc
import NBD
import Testing

@Suite struct KernelDriverTests {
    /// A driver to load with a program of these lines, and what comes of it.
    private func load(_ lines: String, _ root: FakeRoot) -> KernelDeviceError? {
        root.folder("/sys/module")
        root.write("/modprobe", "#!/bin/sh\ncd '\(root.path)'\n\(lines)\n", mode: 0o755)
        do throws(KernelDeviceError) {
            try KernelDriver(root: root.path, programs: ["/nowhere/modprobe", "\(root.path)/modprobe"]).load()
            return nil
        } catch { return error }
    }

    @Test func aLoadedDriverIsLeftAlone() throws {
        let root = try FakeRoot()
        root.folder("/sys/module/nbd")
        #expect(try KernelDriver(root: root.path, programs: []).isLoaded)
        #expect(load("echo ran > ran", root) == nil)
        #expect(root.text("/ran") == nil)
    }

    @Test func whereSysIsNotMountedNothingIsSaidOfDrivers() throws {
        let root = try FakeRoot()
        let error = #expect(throws: KernelDeviceError.self) { try KernelDriver(root: root.path, programs: []).load() }
        #expect(error?.code == ENOENT)
        #expect(error?.message.contains("/sys/module: No such file") == true)
    }

    @Test func aMissingDriverIsLoadedWithRoomForPartitions() throws {
        let root = try FakeRoot()
        #expect(load("echo \"$@\" > words; mkdir -p sys/module/nbd", root) == nil)
        #expect(root.text("/words") == "nbd max_part=31 nbds_max=16\n")
    }

    @Test(.enabled(if: geteuid() == 0, "lowering it needs CAP_SYS_RESOURCE"))
    func aProgramIsNotSparedWhenMemoryRunsOut() throws {
        let root = try FakeRoot()
        let file = "/proc/self/oom_score_adj"
        let ours = open(file, O_WRONLY)
        defer {
            write(ours, "0", 1)
            close(ours)
        }
        try #require(write(ours, "7", 1) == 1)
        let lines = "for i in $(seq 99); do read a <\(file); [ $a = 0 ] && break; sleep 0.1; done; echo $a > adj"
        #expect(load(lines, root)?.message.contains("loaded nothing") == true)
        #expect(root.text("/adj") == "0\n")
    }

    @Test func theTextSaysWhichPackageIsMissing() throws {
        let root = try FakeRoot()
        let error = load("echo 'modprobe: FATAL: Module nbd not found in directory /lib/modules/6.1' >&2; exit 1", root)
        #expect(error?.code == ENODEV)
        let text = try #require(error?.message)
        #expect(text.contains("Module nbd not found in directory /lib/modules/6.1"))
        #expect(text.contains("module package") && text.contains("on the host"))
        #expect(!text.contains("\n"))
    }

    @Test func theTextSaysWhichCapabilityIsMissing() throws {
        let root = try FakeRoot()
        let error = load("echo \"modprobe: ERROR: could not insert 'nbd': Operation not permitted\" >&2; exit 1", root)
        #expect(error?.message.contains("CAP_SYS_MODULE") == true)
    }

    @Test func theTextSaysThatModprobeIsMissing() throws {
        let root = try FakeRoot()
        root.folder("/sys/module")
        let error = #expect(throws: KernelDeviceError.self) {
            try KernelDriver(root: root.path, programs: ["\(root.path)/modprobe"]).load()
        }
        #expect(error?.code == ENODEV)
        #expect(error?.message.contains("kmod") == true)
    }

    @Test func aSuccessThatLoadsNothingIsAnError() throws {
        let root = try FakeRoot()
        #expect(load("exit 0", root)?.message.contains("blacklisted") == true)
        #expect(load("exit 1", root)?.message.contains("failed") == true)
    }

    @Test func aTalkativeModprobeDoesNotFillTheError() throws {
        let root = try FakeRoot()
        let error = load(
            "i=0; while [ $i -lt 5000 ]; do echo 'something went wrong' >&2; i=$((i+1)); done; exit 1", root)
        #expect(try #require(error).message.utf8.count < 10_000)
    }

    /// Of the machine that runs the tests, where the kernel has no modules to load by itself.
    @Test(.enabled(if: access("/sys/module/nbd", F_OK) != 0 && access("/lib/modules", F_OK) != 0))
    func aKernelWithoutTheDriverIsSaidToHaveNone() {
        let error = #expect(throws: KernelDeviceError.self) { try KernelDevices().status() }
        #expect(error?.code == ENODEV)
        #expect(error?.message.contains("no nbd driver") == true)
    }
}
