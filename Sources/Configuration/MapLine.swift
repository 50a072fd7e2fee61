// One line of map.conf: `[tcp://|rdma://]pool/volume [key=value ...] [# comment]`. Words end at blanks; a value with
// blanks is in double quotes, inside of which a backslash stands before a quote and before a backslash.

extension MapEntry {
    /// - Parameter line: without blanks around it and with something in it.
    init(parsing line: String) throws(ConfigurationError) {
        var words = MapWords(line)
        self.init(try VolumeName(parsing: words.name))
        var given: Set<MapKey> = []
        while let (text, value) = try words.next() {
            guard let key = MapKey(rawValue: text) else {
                throw ConfigurationError("unknown key \(excerpt(text)); the keys are \(MapKey.all)")
            }
            guard given.insert(key).inserted else { throw ConfigurationError("'\(text)' is given twice") }
            try set(key, to: value)
        }
        try validate()
    }

    /// As a line has it, without a line end.
    package var line: String {
        let scheme = name.transport.map { "\($0.rawValue)://" } ?? ""
        let settings = MapKey.allCases.compactMap { key in
            value(of: key).map { " \(key.rawValue)=\(Self.quoted($0))" }
        }
        return scheme + "\(name)" + settings.joined()
    }

    private static func quoted(_ value: String) -> String {
        guard value.unicodeScalars.contains(where: { $0 == " " || $0 == "\"" }) else { return value }
        let inner = value.unicodeScalars.map { $0 == "\"" || $0 == "\\" ? "\\\($0)" : "\($0)" }
        return "\"\(inner.joined())\""
    }
}

/// The words of a line.
struct MapWords {
    /// The first word.
    let name: String
    private var rest: Substring.UnicodeScalarView

    init(_ line: String) {
        let scalars = line.unicodeScalars
        name = String(scalars.prefix { !Self.isBlank($0) })
        rest = scalars.drop { !Self.isBlank($0) }
    }

    /// Nil at the end of the line or at a comment.
    mutating func next() throws(ConfigurationError) -> (key: String, value: String)? {
        rest = rest.drop(while: Self.isBlank)
        guard let first = rest.first, first != "#" else { return nil }
        let key = rest.prefix { $0 != "=" && !Self.isBlank($0) }
        rest = rest[key.endIndex...]
        guard !key.isEmpty, rest.first == "=" else {
            throw ConfigurationError(
                "\(excerpt(String(key.isEmpty ? rest : key))) is not key=value; write it so, without blanks around '='")
        }
        rest.removeFirst()
        return (String(key), try value(of: String(key)))
    }

    /// The comment at the end of the line; nil without one. For a line whose words are in order.
    mutating func comment() throws(ConfigurationError) -> String? {
        while try next() != nil {}
        return rest.isEmpty ? nil : String(rest)
    }

    private mutating func value(of key: String) throws(ConfigurationError) -> String {
        guard rest.first == "\"" else {
            let value = rest.prefix { !Self.isBlank($0) }
            guard !value.contains("\"") else {
                throw ConfigurationError(
                    "the value of \(excerpt(key)) has a quote inside; put all of it in quotes and write \\\" for the inner one"
                )
            }
            rest = rest[value.endIndex...]
            return String(value)
        }
        let (value, behind) = try Grammar.unquoted(rest.dropFirst(), key: key)
        guard behind.first.map(Self.isBlank) ?? true else {
            throw ConfigurationError(
                "\(excerpt(String(behind))) follows the quoted value of \(excerpt(key)) without a blank")
        }
        rest = behind
        return value
    }

    private static func isBlank(_ scalar: Unicode.Scalar) -> Bool { scalar == " " || scalar == "\t" }
}
