import Configuration

/// What `throttle -t` says: `read_bps|write_bps|read_iops|write_iops=number`, several separated by commas.
///
/// Nil leaves a limit as it is, 0 removes it.
package struct ThrottleArgument: Sendable, Equatable {
    package private(set) var readBytes: UInt64?
    package private(set) var writeBytes: UInt64?
    package private(set) var readOperations: UInt64?
    package private(set) var writeOperations: UInt64?

    /// - Throws: code 22 for an unknown or repeated key, a missing value, or a bad number.
    package init(parsing text: String) throws(ControlError) {
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            let sides = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2 else {
                throw .invalid("'\(part)' is no limit; write KEY=NUMBER with a KEY of \(Self.keys)")
            }
            try set(String(sides[0]), String(sides[1]))
        }
    }

    private static let keys = "read_bps, write_bps, read_iops or write_iops"

    private mutating func set(_ key: String, _ value: String) throws(ControlError) {
        let limit: WritableKeyPath<ThrottleArgument, UInt64?>
        switch key {
        case "read_bps": limit = \.readBytes
        case "write_bps": limit = \.writeBytes
        case "read_iops": limit = \.readOperations
        case "write_iops": limit = \.writeOperations
        default: throw .invalid("'\(key)' is no limit; the limits are \(Self.keys)")
        }
        guard self[keyPath: limit] == nil else { throw .invalid("\(key) is given twice") }
        do throws(ConfigurationError) {
            self[keyPath: limit] =
                key.hasSuffix("_bps")
                ? try Quantity.parseRate(bytesPerSecond: value) : try Quantity.parseRate(operationsPerSecond: value)
        } catch {
            throw .invalid("\(key): \(error)")
        }
    }
}

/// What `resume -t` says: what becomes of held-back and later I/O.
package enum ResumeMode: String, CaseIterable, Sendable, Codable {
    /// It runs, in its order.
    case normal
    /// It fails with EIO.
    case error
    /// It is answered with success; writes go nowhere, reads return zeros. Loses data by design.
    case discard

    /// - Throws: code 22 for anything but the three.
    package init(parsing text: String) throws(ControlError) {
        guard let mode = ResumeMode(rawValue: text) else {
            throw .invalid("'\(text)' is no way to resume; write -t normal, -t error or -t discard")
        }
        self = mode
    }
}
