/// Latencies in quarter octaves of nanoseconds: 19 % wide at most, from 1 ns to 36 minutes. Nothing is allocated after
/// it was made. Lives on a volume's loop; `summary` copies what others may see.
struct LatencyHistogram: ~Copyable {
    private static let octaves = 41
    private static let count = octaves * 4
    private let buckets: UnsafeMutablePointer<UInt64>

    init() {
        buckets = .allocate(capacity: Self.count)
        buckets.initialize(repeating: 0, count: Self.count)
    }

    deinit { buckets.deallocate() }

    @inline(__always)
    func record(_ nanoseconds: UInt64) {
        buckets[Self.bucket(nanoseconds)] &+= 1
    }

    @inline(__always)
    private static func bucket(_ nanoseconds: UInt64) -> Int {
        let value = max(nanoseconds, 4)
        let octave = 63 &- value.leadingZeroBitCount
        let quarter = Int(truncatingIfNeeded: value >> UInt64(octave &- 2)) & 3
        return min(octave &* 4 &+ quarter, count &- 1)
    }

    /// Upper bound of a bucket, nanoseconds.
    private static func upperBound(_ bucket: Int) -> UInt64 {
        UInt64(5 + bucket % 4) << UInt64(max(bucket / 4 - 2, 0))
    }

    func summary() -> LatencySummary {
        let total = (0..<Self.count).reduce(0) { $0 + buckets[$1] }
        func percentile(_ share: Double) -> Double {
            guard total > 0 else { return 0 }
            let wanted = UInt64((Double(total) * share).rounded(.up))
            var seen: UInt64 = 0
            for bucket in 0..<Self.count {
                seen += buckets[bucket]
                if seen >= wanted { return Double(Self.upperBound(bucket)) / 1000 }
            }
            return 0
        }
        return LatencySummary(
            count: total, p50: percentile(0.5), p90: percentile(0.9), p99: percentile(0.99), p999: percentile(0.999),
            maximum: percentile(1))
    }
}

/// Percentiles in microseconds, each the upper bound of a bucket; 0 where nothing was measured.
package struct LatencySummary: Sendable, Equatable {
    package let count: UInt64
    package let p50: Double
    package let p90: Double
    package let p99: Double
    package let p999: Double
    package let maximum: Double
}
