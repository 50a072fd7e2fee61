import Configuration

/// Limits as they are given: to `throttle -t` as `KEY=NUMBER`, several separated by commas; to `map` as options; in a
/// map.conf as keys.
///
/// Nil leaves a limit as it is, 0 removes it.
package struct ThrottleArgument: Sendable, Equatable, Codable {
    package private(set) var readBytes: UInt64?
    package private(set) var writeBytes: UInt64?
    package private(set) var readOperations: UInt64?
    package private(set) var writeOperations: UInt64?
    /// Milliseconds of each rate that may be saved up.
    package private(set) var burst: UInt64?

    /// The keys, and what each sets. The last six are the names QEMU has for them.
    package static let keys = [
        "read_bps", "write_bps", "read_iops", "write_iops", "burst_ms", "bps_rd", "bps_wr", "iops_rd", "iops_wr", "bps",
        "iops",
    ]

    private static let known = "read_bps, write_bps, read_iops, write_iops, bps, iops or burst_ms"

    package enum CodingKeys: String, CodingKey {
        case readBytes = "read_bps"
        case writeBytes = "write_bps"
        case readOperations = "read_iops"
        case writeOperations = "write_iops"
        case burst = "burst_ms"
    }

    /// Nothing is given.
    package init() {}

    package var isEmpty: Bool { self == ThrottleArgument() }

    /// - Throws: code 22 for an unknown or repeated key, a missing value, or a bad number.
    package init(parsing text: String) throws(ControlError) {
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            let sides = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2 else {
                throw .invalid("'\(part)' is no limit; write KEY=NUMBER with a KEY of \(Self.known)")
            }
            try set(String(sides[0]), String(sides[1]))
        }
    }

    /// Sets what a key means, from the text of its value.
    ///
    /// - Throws: as `init(parsing:)`.
    package mutating func set(_ key: String, _ value: String) throws(ControlError) {
        switch key {
        case "read_bps", "bps_rd": try set([\.readBytes], key, try Self.bytes(value, key))
        case "write_bps", "bps_wr": try set([\.writeBytes], key, try Self.bytes(value, key))
        case "bps": try set([\.readBytes, \.writeBytes], key, try Self.bytes(value, key))
        case "read_iops", "iops_rd": try set([\.readOperations], key, try Self.operations(value, key))
        case "write_iops", "iops_wr": try set([\.writeOperations], key, try Self.operations(value, key))
        case "iops": try set([\.readOperations, \.writeOperations], key, try Self.operations(value, key))
        case "burst_ms": try set([\.burst], key, try Self.milliseconds(value, key))
        default: throw .invalid("'\(key)' is no limit; the limits are \(Self.known)")
        }
    }

    private mutating func set(
        _ limits: [WritableKeyPath<ThrottleArgument, UInt64?>], _ key: String, _ value: UInt64
    ) throws(ControlError) {
        for limit in limits {
            guard self[keyPath: limit] == nil else { throw .invalid("what \(key) sets is given twice") }
            self[keyPath: limit] = value
        }
    }

    /// - Throws: code 22 with what is wrong.
    private static func checked(_ parse: () throws(ConfigurationError) -> UInt64) throws(ControlError) -> UInt64 {
        do throws(ConfigurationError) { return try parse() } catch { throw .invalid("\(error)") }
    }

    private static func bytes(_ value: String, _ key: String) throws(ControlError) -> UInt64 {
        try checked { () throws(ConfigurationError) in try Value.rate(bytesPerSecond: value, of: key) }
    }

    private static func operations(_ value: String, _ key: String) throws(ControlError) -> UInt64 {
        try checked { () throws(ConfigurationError) in try Value.rate(operationsPerSecond: value, of: key) }
    }

    private static func milliseconds(_ value: String, _ key: String) throws(ControlError) -> UInt64 {
        try checked { () throws(ConfigurationError) in try Value.burst(value, of: key) }
    }
}

extension ThrottleArgument {
    /// The limits a volume is to be mapped with.
    package init(_ entry: MapEntry) {
        readBytes = entry.readBytes
        writeBytes = entry.writeBytes
        readOperations = entry.readOperations
        writeOperations = entry.writeOperations
        burst = entry.burst
    }
}
