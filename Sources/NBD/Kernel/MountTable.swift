/// One line of /proc/PID/mountinfo (proc(5)).
package struct Mount: Equatable, Sendable {
    /// `major:minor` of the device; file systems over several devices have a number of their own.
    package let number: String
    package let mountPoint: String
    package let type: String
    /// The device's path as it was given to mount, or whatever else the file system names here.
    package let source: String

    /// Nil for a line that is not of this form.
    package init?(_ line: Substring) {
        let fields = line.split(separator: " ")
        // Between the sixth field and the lone hyphen stands any number of optional ones.
        guard fields.count >= 10, let hyphen = fields[6...].firstIndex(of: "-"), fields.count >= hyphen + 3 else {
            return nil
        }
        number = String(fields[2])
        mountPoint = unescaped(fields[4])
        type = String(fields[hyphen + 1])
        source = unescaped(fields[hyphen + 2])
    }

    package static func table(_ text: String) -> [Mount] { text.split(separator: "\n").compactMap { Mount($0) } }
}

/// One line of /proc/swaps.
package struct Swap: Equatable, Sendable {
    package let path: String
    package let type: String

    package init?(_ line: Substring) {
        let fields = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
        guard fields.count >= 5, fields[0].hasPrefix("/") else { return nil }
        path = unescaped(fields[0])
        type = String(fields[1])
    }

    package static func table(_ text: String) -> [Swap] { text.split(separator: "\n").compactMap { Swap($0) } }
}

/// Blanks, tabs, line ends and backslashes of a path stand as `\040` and the like in both files.
func unescaped(_ field: Substring) -> String {
    guard field.contains("\\") else { return String(field) }
    var bytes: [UInt8] = []
    var rest = Array(field.utf8)[...]
    while let byte = rest.popFirst() {
        let digits = rest.prefix(3)
        if byte == UInt8(ascii: "\\"), digits.count == 3, digits.allSatisfy({ (48..<56).contains($0) }) {
            bytes.append(digits.reduce(0) { $0 &<< 3 | ($1 - 48) })
            rest = rest.dropFirst(3)
        } else {
            bytes.append(byte)
        }
    }
    return String(decoding: bytes, as: UTF8.self)
}
