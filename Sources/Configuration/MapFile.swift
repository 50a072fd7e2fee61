/// A map.conf: the volumes to map at boot, one a line.
///
/// What is wrong with one line does no harm to the others, and changing one line leaves every other byte as it is.
package struct MapFile: Sendable {
    /// A line that says something: a volume, or a fault with its place.
    package struct Line: Sendable {
        /// Counted from 1.
        package let number: Int
        package let content: Result<MapEntry, ConfigurationError>
        /// Whose line it is, as far as its first word says.
        let name: VolumeName?
    }

    /// For error texts.
    package let path: String
    /// In the order of the file.
    package let lines: [Line]
    /// Everything, without the line ends.
    private let text: [ArraySlice<UInt8>]

    /// - Parameter file: the path for error texts; nothing is opened.
    /// - Throws: when the file as a whole cannot be one.
    package init(parsing bytes: [UInt8], file: String) throws(ConfigurationError) {
        path = file
        text = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        var reader = try LineReader(bytes, file: file)
        var lines: [Line] = []
        var owners: [VolumeName: Int] = [:]
        while true {
            do throws(ConfigurationError) {
                guard let line = try reader.next() else { break }
                lines.append(Self.line(line, in: file, &owners))
            } catch {
                lines.append(Line(number: error.line ?? 0, content: .failure(error), name: nil))
            }
        }
        self.lines = lines
    }

    private static func line(_ line: LineReader.Line, in file: String, _ owners: inout [VolumeName: Int]) -> Line {
        let name = try? VolumeName(parsing: MapWords(line.text).name)
        do throws(ConfigurationError) {
            let entry = try MapEntry(parsing: line.text)
            let owner = owners[entry.name, default: line.number]
            guard owner == line.number else {
                throw ConfigurationError("\(entry.name) is in line \(owner) already; remove one of the two")
            }
            owners[entry.name] = line.number
            return Line(number: line.number, content: .success(entry), name: name)
        } catch {
            return Line(number: line.number, content: .failure(error.placed(at: line.number, in: file)), name: name)
        }
    }
}

// MARK: - Changes

extension MapFile {
    /// The file with this line: in the place of the volume's old one, whose comment it keeps, or else at the end.
    func saving(_ entry: MapEntry) -> [UInt8] {
        let old = lines.filter { $0.name == entry.name }.map(\.number)
        guard let first = old.first else {
            var bytes = Array(text.joined(separator: [UInt8(ascii: "\n")]))
            if let last = bytes.last, last != UInt8(ascii: "\n") { bytes.append(UInt8(ascii: "\n")) }
            return bytes + Array("\(entry.line)\n".utf8)
        }
        let before = text[first - 1]
        var words = MapWords(String(decoding: before.filter { $0 != UInt8(ascii: "\r") }, as: UTF8.self))
        let comment = (try? words.comment()).flatMap { $0 }.map { " \($0)" } ?? ""
        let end = before.last == UInt8(ascii: "\r") ? "\r" : ""
        return joined(without: old, replacing: first, by: Array("\(entry.line)\(comment)\(end)".utf8))
    }

    /// The file without this volume's line; nil when it has none.
    func forgetting(_ name: VolumeName) -> [UInt8]? {
        let old = lines.filter { $0.name == name }.map(\.number)
        return old.isEmpty ? nil : joined(without: old)
    }

    private func joined(without numbers: [Int], replacing: Int? = nil, by line: [UInt8] = []) -> [UInt8] {
        var kept: [ArraySlice<UInt8>] = []
        for (index, old) in text.enumerated() {
            if index + 1 == replacing {
                kept.append(line[...])
            } else if !numbers.contains(index + 1) {
                kept.append(old)
            }
        }
        return Array(kept.joined(separator: [UInt8(ascii: "\n")]))
    }
}
