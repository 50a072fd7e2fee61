/// Sizes and rates as people write them.
///
/// A whole number in decimal digits, then blanks or nothing, then one of the suffixes K, M, G, T, P in either case.
/// For bytes the factor is 1024 and the suffix may end in B or iB (`64M`, `64mb`, `64 MiB`; `512B` is 512); for
/// operations it is 1000.
package enum Quantity {
    /// Bytes: 2^63 - 512, the largest multiple of a sector that a file offset holds.
    package static let maximum: UInt64 = (1 << 63) - 512

    /// A size in bytes, 1 (0 where `allowingZero`) to ``maximum``.
    package static func parseSize(_ text: String, allowingZero: Bool = false) throws(ConfigurationError) -> UInt64 {
        let size = try parse(text, as: .size)
        guard size > 0 || allowingZero else {
            throw ConfigurationError("\(excerpt(text)) is no size; it must be greater than 0")
        }
        return size
    }

    /// A rate in bytes per second, 0 to ``maximum``. 0 is unlimited.
    package static func parseRate(bytesPerSecond text: String) throws(ConfigurationError) -> UInt64 {
        try parse(text, as: .byteRate)
    }

    /// A rate in operations per second, 0 to ``maximum``. 0 is unlimited.
    package static func parseRate(operationsPerSecond text: String) throws(ConfigurationError) -> UInt64 {
        try parse(text, as: .operationRate)
    }

    /// `bytes` in the largest unit that holds it as a whole number, so that no digit is lost and ``parseSize(_:allowingZero:)``
    /// reads it back: "64 MiB", "1536 KiB", "1000 B".
    package static func formatSize(_ bytes: UInt64) -> String {
        guard bytes > 0 else { return "0 B" }
        let power = min(bytes.trailingZeroBitCount / 10, units.count)
        guard power > 0 else { return "\(bytes) B" }
        return "\(bytes >> (10 * UInt64(power))) \(units[power - 1].uppercased())iB"
    }

    private static let units = ["k", "m", "g", "t", "p"]

    private struct Kind {
        /// With its article, for error texts.
        let name: String
        let factor: UInt64
        let isBytes: Bool
        let example: String

        static let size = Kind(name: "a size", factor: 1024, isBytes: true, example: "64M or 10G")
        static let byteRate = Kind(name: "a rate in bytes per second", factor: 1024, isBytes: true, example: "100M")
        static let operationRate = Kind(
            name: "a rate in operations per second", factor: 1000, isBytes: false, example: "5000 or 5K")
    }

    private static func parse(_ text: String, as kind: Kind) throws(ConfigurationError) -> UInt64 {
        guard !text.isEmpty else {
            throw ConfigurationError("\(kind.name) is missing; write a number such as \(kind.example)")
        }
        let scalars = text.unicodeScalars
        let digits = scalars.prefix { ("0"..."9").contains($0) }
        guard !digits.isEmpty else {
            throw ConfigurationError(
                scalars.first == "-"
                    ? "\(excerpt(text)) is negative, and \(kind.name) cannot be"
                    : "\(excerpt(text)) is not \(kind.name); write a number such as \(kind.example)")
        }
        let rest = scalars[digits.endIndex...]
        if rest.first == "." || rest.first == "," {
            throw ConfigurationError(
                "\(excerpt(text)) is not a whole number; write it in the next smaller unit, such as 1536M for 1.5G")
        }
        let power = try parseSuffix(String(rest.drop { $0 == " " }), of: text, as: kind)
        var value = UInt64(String(digits))
        for _ in 0..<power {
            value = value.flatMap { checkedProduct($0, kind.factor) }
        }
        guard let value, value <= maximum else {
            throw ConfigurationError(
                "\(excerpt(text)) is too large; the largest is \(maximum)"
                    + (kind.isBytes ? " bytes (8192 PiB less 512 bytes)" : ""))
        }
        return value
    }

    /// The power of the factor: 0 for none, 1 for K, and so on.
    private static func parseSuffix(
        _ suffix: String, of text: String, as kind: Kind
    ) throws(ConfigurationError) -> Int {
        // Only ASCII is folded: the Kelvin sign is no K.
        let folded = suffix.utf8.map { (0x41...0x5A).contains($0) ? $0 | 0x20 : $0 }
        let endings: [String] = kind.isBytes ? ["", "b", "ib"] : [""]
        if folded.isEmpty || kind.isBytes && folded == Array("b".utf8) {
            return 0
        }
        for (index, unit) in units.enumerated() where endings.contains(where: { folded == Array((unit + $0).utf8) }) {
            return index + 1
        }
        throw ConfigurationError("\(excerpt(text)) has the unknown suffix \(excerpt(suffix)); use K, M, G, T or P")
    }

    private static func checkedProduct(_ value: UInt64, _ factor: UInt64) -> UInt64? {
        let (product, overflow) = value.multipliedReportingOverflow(by: factor)
        return overflow ? nil : product
    }
}
