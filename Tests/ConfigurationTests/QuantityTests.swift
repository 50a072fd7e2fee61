import Configuration
import Testing

@Suite("Sizes and rates")
struct QuantityTests {
    @Test(
        "A size is a number of bytes, with suffixes in powers of 1024",
        arguments: [
            ("1", 1), ("512", 512), ("007", 7), ("512B", 512), ("512 b", 512),
            ("1K", 1 << 10), ("1k", 1 << 10), ("1KB", 1 << 10), ("1KiB", 1 << 10), ("1kib", 1 << 10), ("1KIB", 1 << 10),
            ("64M", 64 << 20), ("64 MiB", 64 << 20), ("10g", 10 << 30), ("2T", 2 << 40), ("3P", 3 << 50),
            ("9223372036854775296", (1 << 63) - 512), ("8191P", 8191 << 50),
        ] as [(String, UInt64)])
    func size(text: String, bytes: UInt64) throws {
        #expect(try Quantity.parseSize(text) == bytes)
    }

    @Test(
        "What is no size is refused with a text that says why",
        arguments: [
            ("", "a size is missing; write a number such as 64M or 10G"),
            ("0", "'0' is no size; it must be greater than 0"),
            ("0G", "'0G' is no size; it must be greater than 0"),
            ("-1", "'-1' is negative, and a size cannot be"),
            ("-", "'-' is negative, and a size cannot be"),
            ("+1", "'+1' is not a size; write a number such as 64M or 10G"),
            ("G", "'G' is not a size; write a number such as 64M or 10G"),
            (" 1", "' 1' is not a size; write a number such as 64M or 10G"),
            ("0x10", "'0x10' has the unknown suffix 'x10'; use K, M, G, T or P"),
            ("1X", "'1X' has the unknown suffix 'X'; use K, M, G, T or P"),
            ("1E", "'1E' has the unknown suffix 'E'; use K, M, G, T or P"),
            ("1iB", "'1iB' has the unknown suffix 'iB'; use K, M, G, T or P"),
            ("1Ki", "'1Ki' has the unknown suffix 'Ki'; use K, M, G, T or P"),
            ("1GG", "'1GG' has the unknown suffix 'GG'; use K, M, G, T or P"),
            ("1G ", "'1G ' has the unknown suffix 'G '; use K, M, G, T or P"),
            ("1\u{212A}", "'1\u{212A}' has the unknown suffix '\u{212A}'; use K, M, G, T or P"),
            ("١", "'١' is not a size; write a number such as 64M or 10G"),
            ("1.5G", "'1.5G' is not a whole number; write it in the next smaller unit, such as 1536M for 1.5G"),
            ("1,5G", "'1,5G' is not a whole number; write it in the next smaller unit, such as 1536M for 1.5G"),
        ])
    func refusedSize(text: String, message: String) {
        #expect(failure { try Quantity.parseSize(text) } == message)
    }

    @Test(
        "A size beyond the largest is refused, and nothing overflows",
        arguments: ["99999999P", "8192P", "9223372036854775297", "18446744073709551616", "18446744073709551615K"])
    func tooLarge(text: String) {
        #expect(
            failure { try Quantity.parseSize(text) }
                == "'\(text)' is too large; the largest is 9223372036854775296 bytes (8192 PiB less 512 bytes)")
    }

    @Test("0 is a size where the caller allows it")
    func zero() throws {
        #expect(try Quantity.parseSize("0", allowingZero: true) == 0)
        #expect(try Quantity.parseSize("0K", allowingZero: true) == 0)
    }

    @Test("A rate in bytes has powers of 1024, and 0 means unlimited")
    func byteRate() throws {
        #expect(try Quantity.parseRate(bytesPerSecond: "0") == 0)
        #expect(try Quantity.parseRate(bytesPerSecond: "100M") == 100 << 20)
        #expect(try Quantity.parseRate(bytesPerSecond: "1 GiB") == 1 << 30)
        #expect(
            failure { try Quantity.parseRate(bytesPerSecond: "-5") }
                == "'-5' is negative, and a rate in bytes per second cannot be")
        #expect(
            failure { try Quantity.parseRate(bytesPerSecond: "") }
                == "a rate in bytes per second is missing; write a number such as 100M")
    }

    @Test("A rate in operations has powers of 1000, and 0 means unlimited")
    func operationRate() throws {
        #expect(try Quantity.parseRate(operationsPerSecond: "0") == 0)
        #expect(try Quantity.parseRate(operationsPerSecond: "5000") == 5000)
        #expect(try Quantity.parseRate(operationsPerSecond: "5k") == 5000)
        #expect(try Quantity.parseRate(operationsPerSecond: "2M") == 2_000_000)
        #expect(try Quantity.parseRate(operationsPerSecond: "1G") == 1_000_000_000)
    }

    @Test("Operations are not counted in bytes", arguments: ["5KB", "5KiB", "5B"])
    func operationsInBytes(text: String) {
        #expect(failure { try Quantity.parseRate(operationsPerSecond: text) }.contains("unknown suffix"))
    }

    @Test("A rate of operations that is too large is refused without speaking of bytes")
    func largestOperationRate() {
        #expect(
            failure { try Quantity.parseRate(operationsPerSecond: "9999999P") }
                == "'9999999P' is too large; the largest is 9223372036854775296")
    }

    @Test(
        "A size is written in the largest unit that loses no digit",
        arguments: [
            (0, "0 B"), (1, "1 B"), (1000, "1000 B"), (1024, "1 KiB"), (1536, "1536 B"), (1536 << 10, "1536 KiB"),
            (64 << 20, "64 MiB"), (10 << 30, "10 GiB"), (1 << 40, "1 TiB"), (3 << 50, "3 PiB"), (1 << 60, "1024 PiB"),
            (Quantity.maximum, "9223372036854775296 B"), (UInt64.max, "18446744073709551615 B"),
        ] as [(UInt64, String)])
    func formatted(bytes: UInt64, text: String) {
        #expect(Quantity.formatSize(bytes) == text)
    }

    @Test("Every formatted size reads back as itself")
    func formattedRoundTrip() throws {
        for shift in 0..<63 {
            for factor in [1, 3, 5, 1023, 1025] as [UInt64] {
                let (bytes, overflow) = factor.multipliedReportingOverflow(by: 1 << UInt64(shift))
                guard !overflow, bytes <= Quantity.maximum else { continue }
                #expect(try Quantity.parseSize(Quantity.formatSize(bytes)) == bytes)
            }
        }
    }
}
