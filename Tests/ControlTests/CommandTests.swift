import Configuration
import Control
import Glibc
import Testing

@Suite("Command table")
struct CommandTests {
    @Test(
        "keeps the documented names and numbers",
        arguments: [
            (Command.map, "QBD_IOC_MAP_VOLUME", UInt32(0xfa00)),
            (.unmap, "QBD_IOC_UNMAP_VOLUME", 0xfa01),
            (.remap, "QBD_IOC_REMAP_VOLUME", 0xfa02),
            (.list, "QBD_IOC_LIST_VOLUME", 0xfa03),
            (.setThrottle, "QBD_IOC_SET_THROTTLE", 0xfa04),
            (.suspend, "QBD_IOC_SUSPEND_VOLUME", 0xfa05),
            (.resume, "QBD_IOC_RESUME_VOLUME", 0xfa06),
            (.info, "QBD_IOC_VOLUME_INFO", 0xfa07),
            (.resize, "QBD_IOC_RESIZE_VOLUME", 0xfa08),
            (.version, "QBD_IOC_GET_VERSION", 0xfa09),
            (.create, "QBD_IOC_CREATE_VOLUME", 0xfa10),
            (.delete, "QBD_IOC_DELETE_VOLUME", 0xfa11),
            (.volumes, "QBD_IOC_LIST_POOL", 0xfa12),
            (.createSnapshot, "QBD_IOC_CREATE_SNAPSHOT", 0xfa13),
            (.deleteSnapshot, "QBD_IOC_DELETE_SNAPSHOT", 0xfa14),
            (.rollback, "QBD_IOC_ROLLBACK_VOLUME", 0xfa15),
            (.snapshots, "QBD_IOC_LIST_SNAPSHOT", 0xfa16),
            (.clone, "QBD_IOC_CLONE_VOLUME", 0xfa17),
        ])
    func numbers(command: Command, name: String, number: UInt32) {
        #expect(command.ioctlName == name)
        #expect(command.ioctlNumber == number)
        #expect(command.path == "/v1/\(name)")
        #expect(Command(path: "/v1/\(name)") == command)
    }

    @Test(
        "knows no other path", arguments: ["", "/", "/v1", "/v1/", "/v2/QBD_IOC_MAP_VOLUME", "/v1/QBD_IOC_MAP_VOLUME?"])
    func strangePath(path: String) {
        #expect(Command(path: path) == nil)
    }

    @Test("an error reads like the original's, in one line")
    func errorLine() {
        let error = ControlError.notMapped("csi/foo1 is not mapped\nnot\tat all")
        #expect(
            error.line(for: .unmap)
                == "failed to ioctl /dev/qbdctl with QBD_IOC_UNMAP_VOLUME:25: csi/foo1 is not mapped not at all")
    }

    @Test("what comes later says so with code 95", arguments: Feature.allCases)
    func comesLater(feature: Feature) {
        #expect(feature.comesLater.code == 95)
        #expect(feature.comesLater.message.contains("comes in a later version"))
    }

    @Test("a limit is KEY=NUMBER, several separated by commas")
    func throttle() throws {
        let limits = try ThrottleArgument(parsing: "read_bps=1M,write_iops=2K,read_iops=0")
        #expect(limits.readBytes == 1 << 20)
        #expect(limits.writeBytes == nil, "a limit that is not named stays as it is")
        #expect(limits.readOperations == 0)
        #expect(limits.writeOperations == 2000)
        #expect(limits.burst == nil)
    }

    @Test(
        "the names QEMU has are understood, and one name for both directions",
        arguments: [
            ("bps_rd=1", "read_bps=1"), ("bps_wr=1", "write_bps=1"), ("iops_rd=1", "read_iops=1"),
            ("iops_wr=1", "write_iops=1"), ("bps=2K", "read_bps=2048,write_bps=2048"),
            ("iops=2K,burst_ms=7", "burst_ms=7,read_iops=2000,write_iops=2000"),
        ])
    func throttleAliases(alias: String, meaning: String) throws {
        #expect(try ThrottleArgument(parsing: alias) == ThrottleArgument(parsing: meaning))
    }

    @Test("every key that is offered is understood", arguments: ThrottleArgument.keys)
    func throttleKeys(key: String) throws {
        #expect(try !ThrottleArgument(parsing: "\(key)=1").isEmpty)
    }

    @Test("limits lie flat in a request, and what is not given is absent")
    func throttleRequest() throws {
        let request = SetThrottleRequest(
            volume: "a/b", config: nil, limits: try ThrottleArgument(parsing: "read_bps=1M,burst_ms=50"))
        #expect(try ControlJSON.compact(request) == #"{"burst_ms":50,"read_bps":1048576,"volume":"a/b"}"#)
        let map = MapRequest(
            volume: "a/b", config: "/c", readOnly: false, export: true, limits: try ThrottleArgument(parsing: "iops=5"))
        #expect(
            try ControlJSON.compact(map)
                == #"{"config":"/c","export":true,"read_iops":5,"read_only":false,"volume":"a/b","write_iops":5}"#)
    }

    @Test(
        "a bad limit is refused with code 22",
        arguments: [
            "", "read_bps", "read_bps=", "rbps=1", "read_bps=1,read_bps=2", "read_bps=1,", "read_iops=-1", "=5",
            "bps=1,write_bps=1", "iops_rd=1,read_iops=2", "burst_ms=0", "burst_ms=60001", "burst_ms=1K", "burst_ms=",
        ])
    func badThrottle(text: String) {
        #expect { try ThrottleArgument(parsing: text) } throws: { ($0 as? ControlError)?.code == 22 }
    }

    @Test("the ways to resume are three")
    func resumeMode() throws {
        #expect(try ResumeMode(parsing: "discard") == .discard)
        #expect { try ResumeMode(parsing: "Normal") } throws: { ($0 as? ControlError)?.code == 22 }
    }

    @Test(
        "a volume's name is refused before anybody is asked",
        arguments: [
            ("", 22), ("a", 22), ("a/", 22), ("/b", 22), ("a/b/c", 22), ("../b", 22), ("a/..", 22), ("a b/c", 22),
            ("udp://a/b", 22), ("a/b@", 22), ("rdma://a/b", 95), ("a/b@s", 22),
        ])
    func names(text: String, code: Int32) {
        #expect { try VolumeName.reachable(text) } throws: { ($0 as? ControlError)?.code == code }
    }

    @Test(
        "a configuration's path is absolute and holds no blank",
        arguments: ["", "conf", "./c", "/a b", "/a\tb", "/a\n"])
    func configPath(path: String) {
        #expect { try ConfigPath.validate(path) } throws: { ($0 as? ControlError)?.code == 22 }
    }

    @Test("a good configuration's path stays as it is")
    func goodConfigPath() throws {
        #expect(try ConfigPath.validate("/etc/neonsan/../qbd.conf") == "/etc/neonsan/../qbd.conf")
    }

    @Test("paths of a configuration that mean the same are the same")
    func canonicalConfigPath() throws {
        let folder = "/tmp/qbd-paths-\(getpid())"
        try #require(mkdir(folder, 0o700) == 0)
        defer { for path in ["/link", "/a/b", "/a", ""] { remove(folder + path) } }
        #expect(mkdir(folder + "/a", 0o700) == 0 && mkdir(folder + "/a/b", 0o700) == 0)
        #expect(symlink("a/b", folder + "/link") == 0)
        for (path, meaning) in [
            ("/c", "/c"), ("//c/", "/c"), ("/./a/../c", "/c"), ("/a/b/../../c", "/c"), ("/a/.//../a/b/./..", "/a"),
            ("/missing/../c", "/missing/../c"), ("/link/../c", "/link/../c"),
            ("/link/../b/../../c", "/link/../../c"),
            ("/link/./../..", "/link/../.."),
        ] {
            #expect(ConfigPath.canonical(folder + path) == folder + meaning, "\(path)")
        }
        #expect(ConfigPath.canonical("/../..//tmp/../tmp/.") == "/tmp")
        #expect(ConfigPath.canonical("/..") == "/")
    }
}
