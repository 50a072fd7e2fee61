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

    /// Whether any of the limits that are given is another one than in `limits`.
    package func change(_ limits: Limits) -> Bool {
        func differs(_ given: UInt64?, _ limit: UInt64) -> Bool { given.map { $0 != limit } ?? false }
        return differs(readBytes, limits.readBytes) || differs(writeBytes, limits.writeBytes)
            || differs(readOperations, limits.readOperations) || differs(writeOperations, limits.writeOperations)
            || differs(burst, limits.burst)
    }

    /// Sets what a key means, from the text of its value.
    ///
    /// - Parameter spelling: how the key was given, where that was not under its name.
    /// - Throws: as `init(parsing:)`.
    package mutating func set(_ key: String, _ value: String, as spelling: String? = nil) throws(ControlError) {
        let name = spelling ?? key
        switch key {
        case "read_bps", "bps_rd": try set([.readBytes], name, try Self.bytes(value, name))
        case "write_bps", "bps_wr": try set([.writeBytes], name, try Self.bytes(value, name))
        case "bps": try set([.readBytes, .writeBytes], name, try Self.bytes(value, name))
        case "read_iops", "iops_rd": try set([.readOperations], name, try Self.operations(value, name))
        case "write_iops", "iops_wr": try set([.writeOperations], name, try Self.operations(value, name))
        case "iops": try set([.readOperations, .writeOperations], name, try Self.operations(value, name))
        case "burst_ms": try set([.burst], name, try Self.milliseconds(value, name))
        default: throw .invalid("'\(key)' is no limit; the limits are \(Self.known)")
        }
    }

    private mutating func set(_ limits: [CodingKeys], _ name: String, _ value: UInt64) throws(ControlError) {
        for limit in limits {
            let path: WritableKeyPath<ThrottleArgument, UInt64?> =
                switch limit {
                case .readBytes: \.readBytes
                case .writeBytes: \.writeBytes
                case .readOperations: \.readOperations
                case .writeOperations: \.writeOperations
                case .burst: \.burst
                }
            guard self[keyPath: path] == nil else {
                let key = limit.rawValue
                throw .invalid("\(key) is given twice" + (key == name ? "" : "; \(name) sets it, too"))
            }
            self[keyPath: path] = value
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

extension MapEntry {
    /// Takes the limits that the mapped volume has; what it has by default stays unsaid where nothing was given.
    package mutating func setLimits(_ limits: Limits) {
        func said(_ limit: UInt64, _ given: UInt64?, byDefault standard: UInt64 = 0) -> UInt64? {
            limit == standard && given == nil ? nil : limit
        }
        readBytes = said(limits.readBytes, readBytes)
        writeBytes = said(limits.writeBytes, writeBytes)
        readOperations = said(limits.readOperations, readOperations)
        writeOperations = said(limits.writeOperations, writeOperations)
        burst = said(limits.burst, burst, byDefault: Limits.none.burst)
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
