/// The limits of a volume.
package struct ThrottleLimits: Sendable, Equatable, Codable {
    /// Bytes per second; 0 is none.
    package var readBytes: UInt64
    /// Bytes per second; 0 is none.
    package var writeBytes: UInt64
    /// Per second; 0 is none.
    package var readOperations: UInt64
    /// Per second; 0 is none.
    package var writeOperations: UInt64
    /// Milliseconds of each rate that may be saved up for a burst, 1...60000.
    package var burst: UInt64

    package static let defaultBurst: UInt64 = 100
    package static let burstRange: ClosedRange<UInt64> = 1...60_000
    package static let none = ThrottleLimits()

    package init(
        readBytes: UInt64 = 0, writeBytes: UInt64 = 0, readOperations: UInt64 = 0, writeOperations: UInt64 = 0,
        burst: UInt64 = defaultBurst
    ) {
        self.readBytes = readBytes
        self.writeBytes = writeBytes
        self.readOperations = readOperations
        self.writeOperations = writeOperations
        self.burst = burst
    }

    package var areNone: Bool { readBytes | writeBytes | readOperations | writeOperations == 0 }
}

extension ThrottleLimits: CustomStringConvertible {
    package var description: String {
        guard !areNone else { return "none" }
        return "read_bps=\(readBytes) write_bps=\(writeBytes) read_iops=\(readOperations)"
            + " write_iops=\(writeOperations) burst_ms=\(burst)"
    }
}

/// A token bucket that may go into debt: it fills at `rate` up to `capacity`, and what costs more than it can ever hold
/// passes when it is full and is paid for afterwards. So no request waits for ever, and the average holds for requests
/// of any size.
package struct TokenBucket: Sendable {
    /// Tokens per second; 0 lets everything pass.
    private var rate = 0.0
    private var capacity = 0.0
    /// Below 0 while in debt.
    package private(set) var level = 0.0
    /// When `level` was right, in nanoseconds.
    private var updated: UInt64 = 0

    package init() {}

    /// Sets the limit. What was saved up or is owed stays; but a debt is never worth more time than it was before.
    /// - Parameters:
    ///   - rate: tokens per second, 0 for no limit.
    ///   - burst: milliseconds of the rate that the bucket holds.
    package mutating func set(rate new: UInt64, burst: UInt64, now: UInt64) {
        fill(now)
        let old = rate
        rate = Double(new)
        capacity = rate * Double(burst) / 1000
        if old == 0 {
            level = capacity
        } else if level < 0 {
            level = max(level, level * rate / old)
        } else {
            level = min(level, capacity)
        }
        updated = now
    }

    /// Nanoseconds until something of this cost may pass; 0 for now.
    package mutating func wait(for cost: Double, now: UInt64) -> UInt64 {
        // What costs nothing waits for nobody's debt.
        guard rate > 0, cost > 0 else { return 0 }
        fill(now)
        let missing = min(cost, capacity) - level
        guard missing > 0 else { return 0 }
        return UInt64(min((missing / rate * 1e9).rounded(.up), Self.longestWait))
    }

    /// It passes.
    package mutating func take(_ cost: Double) {
        if rate > 0 { level -= cost }
    }

    /// An hour: whoever waits longer looks again.
    private static let longestWait = 3.6e12

    private mutating func fill(_ now: UInt64) {
        guard now > updated else { return }
        level = min(level + Double(now &- updated) * 1e-9 * rate, capacity)
        updated = now
    }
}

/// The two buckets of a direction: a request passes when both let it.
package struct ThrottleLane: Sendable {
    private var bytes = TokenBucket()
    private var operations = TokenBucket()

    package init() {}

    package mutating func set(bytes: UInt64, operations: UInt64, burst: UInt64, now: UInt64) {
        self.bytes.set(rate: bytes, burst: burst, now: now)
        self.operations.set(rate: operations, burst: burst, now: now)
    }

    /// - Returns: 0 when the request has passed; else the nanoseconds until it may.
    @inline(__always)
    package mutating func pass(bytes cost: UInt64, now: UInt64) -> UInt64 {
        let wait = max(bytes.wait(for: Double(cost), now: now), operations.wait(for: 1, now: now))
        if wait == 0 {
            bytes.take(Double(cost))
            operations.take(1)
        }
        return wait
    }
}
