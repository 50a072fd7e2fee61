import Configuration
import Testing

@Suite("qbd.conf: files that are none")
struct HostileFileTests {
    private static let header = Array("[client]\n".utf8)

    @Test(
        "Control characters are refused wherever they are",
        arguments: [
            (0, "a NUL byte"), (0x1B, "the control character U+001B"), (0x7F, "the control character U+007F"),
            (0x0D, "the control character U+000D"),
        ] as [(UInt8, String)])
    func controlCharacter(byte: UInt8, name: String) {
        for line in ["# x", "io_depth = 6", "[nbd]", "", "\"x"] {
            let bytes = Self.header + Array(line.utf8) + [byte] + Array("4\n".utf8)
            #expect(fault(in: bytes) == "qbd.conf:2: the line holds \(name); remove it")
        }
    }

    @Test(
        "Bytes that are not UTF-8 are refused, in comments too",
        arguments: [
            [0xFF], [0x80], [0xC3], [0xC0, 0x80], [0xED, 0xA0, 0x80], [0xF4, 0x90, 0x80, 0x80],
            [0xCE, 0xD2, 0xCA, 0xC7],
        ] as [[UInt8]])
    func notUTF8(bytes: [UInt8]) {
        for start in ["# ", "[", "x = \"", ""] {
            #expect(
                fault(in: Self.header + Array(start.utf8) + bytes + [0x0A])
                    == "qbd.conf:2: the line is not valid UTF-8; save the file as UTF-8")
        }
    }

    @Test("A file in UTF-16 is told so by its first line")
    func utf16() {
        #expect(fault(in: [0xFF, 0xFE, 0x5B, 0x00]).hasPrefix("qbd.conf:1: "))
    }

    @Test("A byte order mark is tolerated only at the start")
    func byteOrderMark() throws {
        #expect(try configuration("\u{FEFF}[client]\nio_depth=5").client.ioDepth == 5)
        #expect(fault(in: "\n\u{FEFF}[client]").hasPrefix("qbd.conf:2: "))
    }

    @Test("A line of 64 KiB is read, a longer one is refused")
    func longLine() throws {
        let longest = "#" + String(repeating: "x", count: (64 << 10) - 1)
        #expect(try configuration("\(longest)\r\n[nbd]\n\(longest)").warnings == [])
        #expect(
            fault(in: "\n\(longest)x\n")
                == "qbd.conf:2: the line is longer than 64 KiB; is this really a configuration file?")
    }

    @Test("A file of 1 MiB is read, a larger one is refused")
    func largeFile() throws {
        let largest = [UInt8](repeating: 0x0A, count: 1 << 20)
        #expect(try DaemonConfiguration(parsing: largest, file: "qbd.conf").warnings == [])
        #expect(
            fault(in: largest + [0x0A])
                == "qbd.conf: the file is larger than 1 MiB; is it really a configuration file?")
    }

    @Test("Texts quote no more than the beginning of what was wrong, and no control characters")
    func quotedText() throws {
        let long = String(repeating: "x", count: 60_000)
        #expect(fault(in: long).utf8.count < 200)
        #expect(fault(in: "[client]\nio_depth=\(long)").utf8.count < 200)
        #expect(fault(in: "[pool.\(long)]").utf8.count < 300)
        #expect(fault(in: "[pool.\(long)").utf8.count < 200)
        let warnings = try configuration("[\(long)]\n[client]\n\(long)=1\nx\u{202E}\u{85}=2").warnings
        #expect(warnings.allSatisfy { $0.utf8.count < 200 })
        #expect(warnings.last == "qbd.conf:4: unknown key 'x\\u{202e}\\u{85}' in section [client] is ignored")
    }

    /// Deterministic, so that a failure can be run again: xorshift64* from a fixed seed.
    private struct Generator: RandomNumberGenerator {
        var state: UInt64
        mutating func next() -> UInt64 {
            state ^= state >> 12
            state ^= state << 25
            state ^= state >> 27
            return state &* 0x2545_F491_4F6C_DD1D
        }
    }

    @Test("20,000 damaged files are each read or refused, with a line that exists")
    func damagedFiles() throws {
        let seed = Array(try shippedFile(uncommented: true).utf8)
        let alphabet = Array("[]=#\"\\\n\r\t ,.:/-@0aZ\0".utf8) + [0x7F, 0x80, 0xC3, 0xE2, 0xEF, 0xFF]
        var generator = Generator(state: 0x5EED)
        for _ in 0..<20_000 {
            var bytes = Array(seed[..<Int.random(in: 0...seed.count, using: &generator)])
            for _ in 0..<Int.random(in: 1...6, using: &generator) where !bytes.isEmpty {
                let position = Int.random(in: 0..<bytes.count, using: &generator)
                switch Int.random(in: 0..<3, using: &generator) {
                case 0: bytes[position] = alphabet.randomElement(using: &generator) ?? 0
                case 1: bytes.insert(alphabet.randomElement(using: &generator) ?? 0, at: position)
                default: bytes.remove(at: position)
                }
            }
            do throws(ConfigurationError) {
                _ = try DaemonConfiguration(parsing: bytes, file: "f")
            } catch {
                let lines = bytes.count { $0 == 0x0A } + 1
                #expect(error.file == "f" && (1...lines).contains(error.line ?? 1), "\(error)")
                #expect(error.description.utf8.count < 1000)
            }
        }
    }
}
