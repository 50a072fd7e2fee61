/// The two forms of a line: `[section]` and `key = value`, each with an optional `# comment` behind it.
///
/// Functions here throw errors without a place; the reader of the file adds it.
enum Grammar {
    /// The name in `[name]`, or nil when the line is no section header.
    static func section(of line: String) throws(ConfigurationError) -> String? {
        let scalars = line.unicodeScalars
        guard scalars.first == "[" else { return nil }
        guard let end = scalars.firstIndex(where: { $0 == "]" || $0 == "#" }), scalars[end] == "]" else {
            throw ConfigurationError("the section header \(excerpt(line)) has no ']'; write [section]")
        }
        let rest = trimmed(scalars[scalars.index(after: end)...])
        guard rest.isEmpty || rest.first == "#" else {
            throw ConfigurationError("\(excerpt(String(rest))) follows a section header; only a comment can")
        }
        let name = String(trimmed(scalars[..<end].dropFirst()))
        guard !name.isEmpty else {
            throw ConfigurationError("the section header has no name; write [section]")
        }
        return name
    }

    /// The two sides of `key = value`. The value is "" when there is none; quotes and escapes are resolved.
    static func setting(of line: String) throws(ConfigurationError) -> (key: String, value: String) {
        let scalars = line.unicodeScalars
        guard let equals = scalars.firstIndex(where: { $0 == "=" || $0 == "#" }), scalars[equals] == "=" else {
            throw ConfigurationError(
                "\(excerpt(line)) is neither a [section], nor key = value, nor a # comment")
        }
        let key = String(trimmed(scalars[..<equals]))
        guard !key.isEmpty else {
            throw ConfigurationError("there is no key before '='; write key = value")
        }
        let side = trimmed(scalars[scalars.index(after: equals)...])
        return (key, side.first == "\"" ? try quoted(side.dropFirst(), key: key) : try bare(side, key: key))
    }

    private static func bare(
        _ side: Substring.UnicodeScalarView, key: String
    ) throws(ConfigurationError) -> String {
        let value = trimmed(side.prefix { $0 != "#" })
        guard !value.contains("\"") else {
            throw ConfigurationError(
                "the value of \(excerpt(key)) has a quote inside; put all of it in quotes and write \\\" for the inner one"
            )
        }
        return String(value)
    }

    /// - Parameter side: begins behind the opening quote.
    private static func quoted(
        _ side: Substring.UnicodeScalarView, key: String
    ) throws(ConfigurationError) -> String {
        let (value, rest) = try unquoted(side, key: key)
        let behind = trimmed(rest)
        guard behind.isEmpty || behind.first == "#" else {
            throw ConfigurationError(
                "\(excerpt(String(behind))) follows the quoted value of \(excerpt(key)); only a comment can")
        }
        return value
    }

    /// What stands up to the closing quote, escapes resolved, and what is behind that quote.
    ///
    /// - Parameter side: begins behind the opening quote.
    static func unquoted(
        _ side: Substring.UnicodeScalarView, key: String
    ) throws(ConfigurationError) -> (value: String, behind: Substring.UnicodeScalarView) {
        var value = String.UnicodeScalarView()
        var rest = side
        while let scalar = rest.popFirst() {
            switch scalar {
            case "\"":
                return (String(value), rest)
            case "\\":
                guard let escaped = rest.popFirst() else { break }
                guard escaped == "\"" || escaped == "\\" else {
                    throw ConfigurationError(
                        "the value of \(excerpt(key)) has a backslash before \(excerpt(escaped));"
                            + " in quotes write \\\\ for a backslash and \\\" for a quote")
                }
                value.append(escaped)
            default:
                value.append(scalar)
            }
        }
        throw ConfigurationError("the value of \(excerpt(key)) has no closing quote")
    }

    /// Without the blanks and tabs at both ends.
    static func trimmed(_ text: Substring.UnicodeScalarView) -> Substring.UnicodeScalarView {
        let isBlank = { (scalar: Unicode.Scalar) in scalar == " " || scalar == "\t" }
        guard let first = text.firstIndex(where: { !isBlank($0) }), let last = text.lastIndex(where: { !isBlank($0) })
        else {
            return text[text.endIndex...]
        }
        return text[first...last]
    }
}
