import Glibc
import Logging

/// One line an event on stderr: `2026-11-21T01:02:03.456Z INFO qbdd: mapped volume=pool/volume`; under systemd, which
/// knows the time, `<6>mapped volume=pool/volume`, with the priority of sd-daemon(3) in front.
package struct StandardErrorLog: LogHandler {
    package var metadata: Logger.Metadata = [:]
    package var metadataProvider: Logger.MetadataProvider?
    package var logLevel: Logger.Level
    private let program: String
    private let isJournal: Bool

    /// - Parameter program: the name at the front of each line.
    package init(program: String, level: Logger.Level) {
        self.program = program
        logLevel = level
        isJournal = Self.isJournalAtStandardError
    }

    package subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    package func log(event: LogEvent) {
        var line =
            isJournal
            ? "<\(event.level.priority)>" : "\(Self.now) \(event.level.rawValue.uppercased()) \(program): "
        Self.append(event.message.description, to: &line, quotingBlanks: false)
        var fields = metadata
        if let extra = event.metadata { fields.merge(extra) { $1 } }
        // The volume comes first: it is what people look for.
        for key in ["volume"] + fields.keys.filter({ $0 != "volume" }).sorted() {
            guard let value = fields[key] else { continue }
            line += " \(key)="
            Self.append("\(value)", to: &line, quotingBlanks: true)
        }
        line += "\n"
        // One write, so that lines of different threads do not mix; when stderr is closed there is nobody to tell.
        let bytes = Array(line.utf8)
        _ = write(STDERR_FILENO, bytes, bytes.count)
    }

    /// Appends text that may come from a client: no control character reaches the log.
    private static func append(_ text: String, to line: inout String, quotingBlanks: Bool) {
        let quoted = quotingBlanks && (text.isEmpty || text.unicodeScalars.contains(" "))
        if quoted { line += "\"" }
        for scalar in text.unicodeScalars {
            switch scalar.properties.generalCategory {
            case .control, .format, .lineSeparator, .paragraphSeparator:
                line += "\\u{\(String(scalar.value, radix: 16))}"
            default: line.unicodeScalars.append(scalar)
            }
        }
        if quoted { line += "\"" }
    }

    /// systemd names the stream it gave in JOURNAL_STREAM; a program may have been given another stderr since.
    private static var isJournalAtStandardError: Bool {
        guard let named = getenv("JOURNAL_STREAM").map({ String(cString: $0) }) else { return false }
        var status = stat()
        return fstat(STDERR_FILENO, &status) == 0 && named == "\(status.st_dev):\(status.st_ino)"
    }

    /// RFC 3339 in UTC, milliseconds.
    private static var now: String {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        var parts = tm()
        gmtime_r(&time.tv_sec, &parts)
        func padded(_ number: some BinaryInteger, _ width: Int) -> String {
            let digits = String(number)
            return String(repeating: "0", count: max(width - digits.utf8.count, 0)) + digits
        }
        return "\(Int(parts.tm_year) + 1900)-\(padded(parts.tm_mon + 1, 2))-\(padded(parts.tm_mday, 2))"
            + "T\(padded(parts.tm_hour, 2)):\(padded(parts.tm_min, 2)):\(padded(parts.tm_sec, 2))"
            + ".\(padded(time.tv_nsec / 1_000_000, 3))Z"
    }
}

extension Logger.Level {
    /// syslog(3)'s.
    fileprivate var priority: Int {
        switch self {
        case .trace, .debug: 7
        case .info: 6
        case .notice: 5
        case .warning: 4
        case .error: 3
        case .critical: 2
        }
    }
}
