/// The lines of a configuration file that say something, in order: checked UTF-8, without the blanks around them,
/// without blank lines and lines that are only a comment.
///
/// A byte order mark at the start and CR before the end of a line are tolerated. Nothing in the bytes can do more
/// harm than a ``ConfigurationError``.
struct LineReader {
    struct Line: Equatable {
        /// Counted from 1.
        let number: Int
        let text: String
    }

    /// Bytes: no file of this kind is larger, and a mistaken path should not fill the memory.
    static let maximumFileLength = 1 << 20
    /// Bytes, without the end of the line.
    static let maximumLineLength = 64 << 10

    private let bytes: [UInt8]
    private let file: String
    private var position: Int
    private var number = 0

    init(_ bytes: [UInt8], file: String) throws(ConfigurationError) {
        guard bytes.count <= Self.maximumFileLength else {
            throw Self.tooLarge(file: file)
        }
        self.bytes = bytes
        self.file = file
        position = bytes.starts(with: [0xEF, 0xBB, 0xBF]) ? 3 : 0
    }

    static func tooLarge(file: String) -> ConfigurationError {
        ConfigurationError(
            "the file is larger than \(maximumFileLength >> 20) MiB; is it really a configuration file?", file: file)
    }

    /// Nil after the last line.
    mutating func next() throws(ConfigurationError) -> Line? {
        while position < bytes.count {
            let end = bytes[position...].firstIndex(of: UInt8(ascii: "\n")) ?? bytes.count
            var line = bytes[position..<end]
            position = end + 1
            number += 1
            if line.last == UInt8(ascii: "\r") {
                line.removeLast()
            }
            // Comments too: a file in another encoding is a mistake to be told at once, not when a value is added.
            let content = Grammar.trimmed(try decode(line).unicodeScalars[...])
            if let first = content.first, first != "#" {
                return Line(number: number, text: String(content))
            }
        }
        return nil
    }

    private func decode(_ line: ArraySlice<UInt8>) throws(ConfigurationError) -> String {
        guard line.count <= Self.maximumLineLength else {
            throw fault(
                "the line is longer than \(Self.maximumLineLength >> 10) KiB; is this really a configuration file?")
        }
        if let control = line.first(where: { $0 < 0x20 && $0 != UInt8(ascii: "\t") || $0 == 0x7F }) {
            let name = control == 0 ? "a NUL byte" : "the control character \(excerpt(Unicode.Scalar(control)))"
            throw fault("the line holds \(name); remove it")
        }
        guard let text = String(validating: line, as: UTF8.self) else {
            throw fault("the line is not valid UTF-8; save the file as UTF-8")
        }
        return text
    }

    private func fault(_ message: String) -> ConfigurationError {
        ConfigurationError(message, file: file, line: number)
    }
}
