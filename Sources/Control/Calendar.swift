import Glibc

/// Times for people.
package enum Calendar {
    /// Seconds since 1970 as RFC 3339 in UTC, without a blank: `2026-11-21T01:02:03Z`.
    package static func text(_ seconds: Int64) -> String {
        var time = time_t(seconds)
        var parts = tm()
        guard gmtime_r(&time, &parts) != nil else { return String(seconds) }
        func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : String(number) }
        let date = "\(Int(parts.tm_year) + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday))"
        return date + "T\(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec))Z"
    }
}
