import Configuration

/// The output of `qbd info`, for people: one `key: value` a line.
package enum StatusText {
    package static func text(_ status: MappingStatus) -> String {
        let mapping = status.mapping
        let counters = status.counters
        let latency = status.latency
        var lines: [(String, String)] = [
            ("volume", mapping.volume),
            ("volume id", mapping.volumeID),
            ("device", mapping.device == "-" ? "- (exported over NBD only)" : "/dev/\(mapping.device)"),
            ("uri", mapping.uri),
            ("size", size(mapping.size)),
            ("block size", "\(mapping.blockSize) B"),
            ("protocol", mapping.transport),
            ("access", mapping.readOnly ? "read-only" : "read-write"),
            ("config", mapping.config),
            ("state", "\(mapping.state) since \(Calendar.text(mapping.since))"),
            ("health", "\(mapping.health) since \(Calendar.text(mapping.healthSince))"),
        ]
        if let since = mapping.flushesFailSince {
            lines.append(
                (
                    "flushes fail",
                    "since \(Calendar.text(since)): what was acknowledged may be lost; unmap it and map it anew"
                ))
        }
        lines += [
            ("connections", String(mapping.connections)),
            ("limits", limits(mapping.limits)),
            ("reads", "\(counters.reads), \(size(counters.readBytes))"),
            ("writes", "\(counters.writes), \(size(counters.writtenBytes))"),
            ("flushes", String(counters.flushes)),
            ("trims", String(counters.trims)),
            ("errors", String(counters.errors)),
            ("slow", String(counters.slow)),
            ("in flight", String(counters.inFlight)),
            ("held back", heldBack(status.heldBack)),
        ]
        lines += cluster(status)
        if let room = status.room {
            lines.append(
                (
                    "pool",
                    "\(size(room.free)) of \(size(room.total)) free\(room.nearlyFull ? "; NEARLY FULL: make room" : "")"
                ))
        }
        if status.shards != nil || status.waits != nil { lines.append(("waits", status.waits ?? "no")) }
        lines.append(("read latency", percentiles(latency.reads)))
        lines.append(("write latency", percentiles(latency.writes)))
        lines.append(("flush latency", percentiles(latency.flushes)))
        let width = lines.map { $0.0.utf8.count }.max() ?? 0
        return lines.map { key, value in
            "\(key):\(String(repeating: " ", count: width - key.utf8.count + 1))\(value)\n"
        }.joined()
    }

    /// Lines on the cluster of a volume; none for others.
    package static func cluster(_ status: MappingStatus) -> [(String, String)] {
        guard let shards = status.shards else { return [] }
        let lost = shards.filter { $0.store == nil }.map(\.index)
        return [
            ("conductor", status.conductor ?? "-"),
            ("shards", "\(shards.count)" + (lost.isEmpty ? "" : ", no store serves \(ranges(lost))")),
        ] + (status.stores ?? []).map { ("store", line($0, shards)) }
    }

    static func size(_ bytes: UInt64) -> String {
        bytes < 1024 ? "\(bytes) B" : "\(rounded(bytes)) (\(bytes) B)"
    }

    /// Two digits behind the point of the largest unit that fits.
    private static func rounded(_ bytes: UInt64) -> String {
        let exact = Quantity.formatSize(bytes)
        guard exact.utf8.count > 9 || exact.hasSuffix(" B") else { return exact }
        let units = ["KiB", "MiB", "GiB", "TiB", "PiB"]
        var index = 0
        while index + 1 < units.count, bytes >> UInt64(10 * (index + 2)) > 0 { index += 1 }
        let hundredths = UInt64((Double(bytes) / Double(UInt64(1) << UInt64(10 * (index + 1))) * 100).rounded())
        let fraction = hundredths % 100
        return "\(hundredths / 100).\(fraction < 10 ? "0" : "")\(fraction) \(units[index])"
    }

    /// `key=value` of each limit, or "none".
    package static func limits(_ limits: Limits) -> String {
        let sum = limits.readBytes | limits.writeBytes | limits.readOperations | limits.writeOperations
        guard sum != 0 else { return "none" }
        func one(_ name: String, _ value: UInt64) -> String { "\(name)=\(value == 0 ? "unlimited" : String(value))" }
        return [
            one("read_bps", limits.readBytes), one("write_bps", limits.writeBytes),
            one("read_iops", limits.readOperations), one("write_iops", limits.writeOperations),
            "burst_ms=\(limits.burst)",
        ].joined(separator: " ")
    }

    private static func heldBack(_ held: MappingStatus.HeldBack) -> String {
        guard held.requests > 0 else { return "0" }
        let why = held.by == "throttle" ? "they wait for their limits" : "the volume is suspended"
        return "\(held.requests), the oldest for \(held.oldest / 1000).\(held.oldest / 100 % 10) s: \(why)"
    }

    /// As in "192.0.2.1, connected, shards 0-2 5, 1 connection, 3 in flight".
    private static func line(_ store: MappingStatus.Store, _ shards: [MappingStatus.Shard]) -> String {
        let own = shards.filter { $0.store == store.address }.map(\.index)
        let serves = own.isEmpty ? "no shard" : "shard\(own.count == 1 ? "" : "s") \(ranges(own))"
        let count = "\(store.connections) connection\(store.connections == 1 ? "" : "s")"
        let trouble = store.trouble.map { "; \($0)" } ?? ""
        return "\(store.address), \(store.state), \(serves), \(count), \(store.inFlight) in flight\(trouble)"
    }

    /// - Parameter numbers: ascending.
    private static func ranges(_ numbers: [Int]) -> String {
        var runs: [ClosedRange<Int>] = []
        for number in numbers {
            if let last = runs.last, last.upperBound + 1 == number {
                runs[runs.count - 1] = last.lowerBound...number
            } else {
                runs.append(number...number)
            }
        }
        return runs.map { $0.count == 1 ? "\($0.lowerBound)" : "\($0.lowerBound)-\($0.upperBound)" }
            .joined(separator: " ")
    }

    private static func percentiles(_ value: MappingStatus.Percentiles) -> String {
        guard value.count > 0 else { return "- (none yet)" }
        let parts = [
            ("p50", value.p50), ("p90", value.p90), ("p99", value.p99), ("p99.9", value.p999), ("max", value.max),
        ]
        return parts.map { "\($0) \(microseconds($1))" }.joined(separator: ", ")
    }

    /// Tenths below 100 us, whole ones from there on.
    private static func microseconds(_ value: Double) -> String {
        guard value < 100 else { return "\(UInt64(min(value, 1e15).rounded())) us" }
        let tenths = UInt64((max(value, 0) * 10).rounded())
        return "\(tenths / 10).\(tenths % 10) us"
    }
}
