/// One command's question, and the type of its answer.
package protocol ControlRequest: Codable, Sendable, Equatable {
    associatedtype Answer: Codable, Sendable
    static var command: Command { get }
}

/// The answer of a command that has nothing to tell but success.
package struct Done: Codable, Sendable, Equatable {
    package init() {}
}

/// The limits of a mapped volume; 0 is unlimited.
package struct Limits: Codable, Sendable, Equatable {
    /// Bytes per second.
    package var readBytes: UInt64
    /// Bytes per second.
    package var writeBytes: UInt64
    /// Operations per second.
    package var readOperations: UInt64
    /// Operations per second.
    package var writeOperations: UInt64
    /// Milliseconds of each rate that may be saved up.
    package var burst: UInt64

    package static let none = Limits(readBytes: 0, writeBytes: 0, readOperations: 0, writeOperations: 0, burst: 100)

    package init(
        readBytes: UInt64, writeBytes: UInt64, readOperations: UInt64, writeOperations: UInt64, burst: UInt64
    ) {
        self.burst = burst
        self.readBytes = readBytes
        self.writeBytes = writeBytes
        self.readOperations = readOperations
        self.writeOperations = writeOperations
    }

    package enum CodingKeys: String, CodingKey {
        case readBytes = "read_bps"
        case writeBytes = "write_bps"
        case readOperations = "read_iops"
        case writeOperations = "write_iops"
        case burst = "burst_ms"
    }
}
