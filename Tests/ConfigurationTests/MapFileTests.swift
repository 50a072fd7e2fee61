import Configuration
import Glibc
import Testing

/// A list of volumes in a file that is called map.conf.
private func mapFile(_ text: String) throws -> MapFile {
    try MapFile(parsing: Array(text.utf8), file: "map.conf")
}

/// What each line of `text` says: the line as it would be written, or why it is none.
private func lines(_ text: String) throws -> [String] {
    try mapFile(text).lines.map { line in
        switch line.content {
        case .success(let entry): entry.line
        case .failure(let error): "\(error)"
        }
    }
}

private let allKeys =
    "config, export, readonly, device, read_bps, write_bps, read_iops, write_iops, burst_ms, hook or hook_timeout"

@Suite("map.conf")
struct MapFileTests {
    @Test("A line is a volume and what is said of it, in any order; blank lines and comments say nothing")
    func grammar() throws {
        let file = try mapFile(
            "\u{FEFF}# comment\n\n  disk/a\r\n\ttcp://disk/b \t readonly=yes export=1 # why\n#disk/c\nrdma://x/y@z config=/a#b #"
        )
        #expect(file.lines.map(\.number) == [3, 4, 6])
        let entries = try file.lines.map { try $0.content.get() }
        #expect(entries.map { "\($0.name)" } == ["disk/a", "disk/b", "x/y@z"])
        #expect(entries[0] == MapEntry(try VolumeName(parsing: "disk/a")))
        #expect(entries[1].readOnly && entries[1].export && entries[1].name.transport == .tcp)
        #expect(entries[2].config == "/a#b" && !entries[2].readOnly && !entries[2].export)
    }

    @Test("Every key is understood, and written back as it was read")
    func keys() throws {
        let values: [MapKey: [String]] = [
            .config: ["/etc/neonsan/other.conf"], .export: ["1"], .readOnly: ["1"], .device: ["/dev/nbd7"],
            .readBytes: ["0", "1048576"], .writeBytes: ["1"], .readOperations: ["5000"], .writeOperations: ["0"],
            .burst: ["1", "60000"],
            .hook: ["none", "/usr/sbin/hook", "/with blank/a\"b\\c"], .hookTimeout: ["1", "86400"],
        ]
        #expect(Set(values.keys) == Set(MapKey.allCases))
        for (key, values) in values {
            for value in values {
                var entry = MapEntry(try VolumeName(parsing: "tcp://disk/a"))
                try entry.set(key, to: value)
                #expect(entry.line.hasPrefix("tcp://disk/a \(key.rawValue)="))
                let read = try #require(try mapFile(entry.line).lines.first).content.get()
                #expect(read == entry && read.line == entry.line)
            }
        }
    }

    @Test("What is not said, or said to be off, leaves no word in the line")
    func off() throws {
        #expect(try lines("a/b export=0 readonly=off") == ["a/b"])
        #expect(try lines("a/b hook=\"/x y\" config=\"/c\"") == ["a/b config=/c hook=\"/x y\""])
    }

    @Test(
        "What is wrong with a line is said with its place, and does no harm to the lines around it",
        arguments: [
            ("foo", "'foo' names no pool; write pool/volume"),
            ("nfs://a/b", "'nfs://a/b' has the unknown protocol 'nfs'; write tcp://, rdma://, or none"),
            ("a/b/c", "the volume name 'b/c' holds '/'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/..", "the volume name cannot be '..'"),
            ("a/b# x", "the volume name 'b#' holds '#'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/b readonly", "'readonly' is not key=value; write it so, without blanks around '='"),
            ("a/b readonly = 1", "'readonly' is not key=value; write it so, without blanks around '='"),
            ("a/b =1", "'=1' is not key=value; write it so, without blanks around '='"),
            ("a/b ro=1", "unknown key 'ro'; the keys are \(allKeys)"),
            ("a/b Export=1", "unknown key 'Export'; the keys are \(allKeys)"),
            ("a/b read_bps=-1", "'read_bps': '-1' is negative, and a rate in bytes per second cannot be"),
            (
                "a/b write_iops=1KiB",
                "'write_iops': '1KiB' has the unknown suffix 'KiB'; use K, M, G, T or P"
            ),
            ("a/b burst_ms=0", "'burst_ms' is '0'; it must be a whole number of milliseconds from 1 to 60000"),
            ("a/b readonly=2", "'readonly' is '2'; it must be 1 or 0"),
            ("a/b readonly=", "'readonly' has no value; write readonly=VALUE, or leave it out"),
            ("a/b export=1 export=1", "'export' is given twice"),
            ("a/b export=1 device=/dev/nbd0", "an export has no device, so 'device' does not go with 'export'"),
            ("a/b config=x.conf", "'config' is 'x.conf'; it must be an absolute path, one that starts with /"),
            (
                "a/b config=\"/x y\"",
                "'config' is '/x y'; it cannot hold a blank, because the fields of 'qbd list' end at blanks"
            ),
            ("a/b hook=nothing", "'hook' is 'nothing'; it must be an absolute path, one that starts with /"),
            ("a/b hook_timeout=0", "'hook_timeout' is '0'; it must be a whole number of seconds from 1 to 86400"),
            ("a/b hook=\"/x", "the value of 'hook' has no closing quote"),
            ("a/b hook=\"/x\"y", "'y' follows the quoted value of 'hook' without a blank"),
            (
                "a/b hook=/x\"y",
                "the value of 'hook' has a quote inside; put all of it in quotes and write \\\" for the inner one"
            ),
            ("\u{1}", "the line holds the control character U+0001; remove it"),
            ("a/1", "a/1 is in line 1 already; remove one of the two"),
        ])
    func fault(line: String, message: String) throws {
        #expect(try lines("a/1\n\(line)\na/2") == ["a/1", "map.conf:2: \(message)", "a/2"])
    }

    @Test("A file that is none is refused as a whole, whatever else is in it line by line")
    func hostile() throws {
        let largest = [UInt8](repeating: 0x0A, count: 1 << 20)
        #expect(try MapFile(parsing: largest, file: "map.conf").lines.isEmpty)
        #expect(
            failure(of: { try MapFile(parsing: largest + [0x0A], file: "map.conf") })
                == "map.conf: the file is larger than 1 MiB; is it really a configuration file?")
        let binary = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 31) }
        for line in try MapFile(parsing: binary, file: "map.conf").lines {
            #expect(throws: ConfigurationError.self) { try line.content.get() }
        }
    }
}

@Suite("etc/map.conf")
struct ShippedMapFileTests {
    @Test("As it is shipped it maps nothing")
    func shipped() throws {
        #expect(try lines(shippedFile("map.conf", uncommented: false)) == [])
    }

    @Test("With every example uncommented it is right, and shows every key")
    func uncommented() throws {
        let examples = try mapFile(shippedFile("map.conf", uncommented: true)).lines.map { try $0.content.get().line }
        #expect(examples.first == "disks/one")
        for key in MapKey.allCases {
            #expect(examples.contains { $0.contains(" \(key.rawValue)=") }, "no example of \(key.rawValue)")
        }
    }
}

@Suite("map.conf: changes")
final class MapFileChangeTests {
    private let folder: String

    init() throws {
        var template = Array("/tmp/qbd-map-XXXXXX".utf8CString)
        folder = String(cString: try #require(mkdtemp(&template)))
    }

    deinit {
        for name in (try? names()) ?? [] { unlink("\(folder)/\(name)") }
        rmdir(folder)
    }

    private var path: String { "\(folder)/map.conf" }

    private func names() throws -> [String] {
        let directory = try #require(opendir(folder))
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    private func write(_ text: String, to name: String = "map.conf") throws {
        let file = try #require(fopen("\(folder)/\(name)", "w"))
        #expect(fputs(text, file) >= 0)
        #expect(fclose(file) == 0)
    }

    private func text(of name: String = "map.conf") throws -> String {
        let file = try #require(fopen("\(folder)/\(name)", "r"))
        defer { fclose(file) }
        var bytes = [UInt8](repeating: 0, count: 1 << 16)
        let count = fread(&bytes, 1, bytes.count, file)
        return try #require(String(validating: bytes[..<count], as: UTF8.self))
    }

    private func entry(_ line: String) throws -> MapEntry {
        try #require(try MapFile(parsing: Array(line.utf8), file: "f").lines.first).content.get()
    }

    /// What `before` becomes.
    private func saving(_ line: String, into before: String) throws -> String {
        try write(before)
        try MapFile.save(try entry(line), path: path)
        #expect(try names() == ["map.conf"])
        return try text()
    }

    @Test("A new volume goes to the end, whether the last line has an end or not")
    func append() throws {
        #expect(try saving("a/b export=1", into: "") == "a/b export=1\n")
        #expect(try saving("a/b export=1", into: "# x\na/a # y\n") == "# x\na/a # y\na/b export=1\n")
        #expect(try saving("a/b", into: "a/a") == "a/a\na/b\n")
        #expect(try saving("a/b", into: "a/b@s\n") == "a/b@s\na/b\n", "a snapshot is another one")
    }

    @Test("A volume that has a line keeps its place and its comment; all else stays as it is, also what is wrong")
    func update() throws {
        let around = ("# head\n\n  a/a   readonly=1 # one\n\u{1} wrong\nfoo\n", "\n# foot\n\n\ta/c\n#")
        #expect(
            try saving("tcp://a/b readonly=1", into: around.0 + "a/b export=1\t# two # three" + around.1)
                == around.0 + "tcp://a/b readonly=1 # two # three" + around.1)
        #expect(try saving("a/b", into: around.0 + "rdma://a/b" + around.1) == around.0 + "a/b" + around.1)
        #expect(try saving("a/b", into: "a/b nonsense\r\na/c\r\n") == "a/b\r\na/c\r\n", "a line that was wrong")
        #expect(try saving("a/b", into: "a/b hook=\"# x\" #y\n") == "a/b #y\n")
        #expect(try saving("a/b export=1", into: "a/b\na/c\na/b\n") == "a/b export=1\na/c\n", "a line too many")
    }

    @Test("Forgetting takes the volume's line and nothing else")
    func forget() throws {
        try write("# one\na/a\r\n# two\n a/b export=1 # x\n\na/c")
        #expect(try MapFile.forget(try VolumeName(parsing: "rdma://a/b"), path: path))
        #expect(try text() == "# one\na/a\r\n# two\n\na/c")
        #expect(try !MapFile.forget(try VolumeName(parsing: "a/b"), path: path))
        #expect(try MapFile.forget(try VolumeName(parsing: "a/c"), path: path))
        #expect(try text() == "# one\na/a\r\n# two\n")
        #expect(try names() == ["map.conf"])
    }

    @Test("A file that is missing is made by saving, and an error of forgetting")
    func missing() throws {
        let name = try VolumeName(parsing: "a/b")
        #expect(failure(of: { try MapFile.forget(name, path: self.path) }).contains("No such file"))
        #expect(try names() == [])
        try MapFile.save(MapEntry(name), path: path)
        #expect(try text() == "a/b\n")
        var status = stat()
        #expect(stat(path, &status) == 0 && status.st_mode & 0o7777 == 0o644)
        #expect(
            failure(of: { try MapFile.save(MapEntry(name), path: "\(self.folder)/no/map.conf") })
                == "\(folder)/no/map.conf: cannot write the list of volumes: No such file or directory")
    }

    @Test("The new file has the old one's mode, and a symbolic link to it stays one")
    func modeAndLink() throws {
        try write("a/a\n", to: "real")
        chmod("\(folder)/real", 0o640)
        symlink("real", path)
        try MapFile.save(MapEntry(try VolumeName(parsing: "a/b")), path: path)
        var status = stat()
        #expect(lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFLNK)
        #expect(try text(of: "real") == "a/a\na/b\n")
        #expect(stat(path, &status) == 0 && status.st_mode & 0o7777 == 0o640)
        #expect(try names() == ["map.conf", "real"])
    }

    @Test("What a crash left of a change is overwritten by the next one")
    func leftover() throws {
        try write("a/a\n")
        try write("half of a file, and longer than the whole one", to: ".map.conf.new")
        try MapFile.save(MapEntry(try VolumeName(parsing: "a/b")), path: path)
        #expect(try text() == "a/a\na/b\n")
        #expect(try names() == ["map.conf"])
    }

    @Test("A FIFO in the way is neither waited for nor read", .timeLimit(.minutes(1)))
    func fifo() throws {
        try write("a/a\n")
        try #require(mkfifo("\(folder)/.map.conf.new", 0o600) == 0)
        try MapFile.save(MapEntry(try VolumeName(parsing: "a/b")), path: path)
        #expect(try text() == "a/a\na/b\n")
        unlink(path)
        try #require(mkfifo(path, 0o600) == 0)
        #expect(throws: ConfigurationError.self) { try MapFile.load(path: path) }
        #expect(throws: ConfigurationError.self) {
            try MapFile.save(MapEntry(try VolumeName(parsing: "a/b")), path: path)
        }
        #expect(try names() == ["map.conf"], "and it is not replaced")
    }

    @Test("A file that cannot be read is not replaced by one with a single line")
    func unreadable() throws {
        let entry = MapEntry(try VolumeName(parsing: "a/b"))
        // A path that leads nowhere is not one that is not there.
        try #require(symlink("map.conf", path) == 0)
        #expect(throws: ConfigurationError.self) { try MapFile.save(entry, path: path) }
        unlink(path)
        try #require(mkdir(path, 0o700) == 0)
        #expect(throws: ConfigurationError.self) { try MapFile.save(entry, path: path) }
        #expect(try names() == ["map.conf"])
        rmdir(path)
    }

    @Test("Changes at the same time wait for each other, and none is lost")
    func together() async throws {
        let path = self.path
        try await withThrowingTaskGroup(of: Void.self) { group in
            for index in 0..<20 {
                group.addTask { try MapFile.save(MapEntry(try VolumeName(parsing: "a/v\(index)")), path: path) }
            }
            try await group.waitForAll()
        }
        #expect(try MapFile.load(path: path).lines.count == 20)
        #expect(try names() == ["map.conf"])
    }
}
