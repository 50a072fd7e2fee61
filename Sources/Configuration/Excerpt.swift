/// Text from outside in single quotes, as ``printable(_:)`` makes it.
func excerpt(_ text: some StringProtocol) -> String {
    "'\(printable(text))'"
}

/// Text from outside, fit for one line of a log: control characters as `\u{...}`, and no more than 64 characters of it.
/// What a ``VolumeName`` may hold comes out unchanged but for the length.
func printable(_ text: some StringProtocol) -> String {
    let limit = 64
    var result = ""
    for (index, scalar) in text.unicodeScalars.enumerated() {
        if index == limit {
            return result + "..."
        }
        if scalar.isPrintable {
            result.unicodeScalars.append(scalar)
        } else {
            result += scalar.escaped
        }
    }
    return result
}

/// One character for an error text: as it is when it is printable ASCII, with its number when a reader could mistake
/// it for another or not see it.
func excerpt(_ scalar: Unicode.Scalar) -> String {
    let number = "U+\(scalar.paddedHexadecimal)"
    guard scalar.isPrintable else { return number }
    return scalar.isASCII && scalar != " " ? "'\(scalar)'" : "'\(scalar)' (\(number))"
}

extension Unicode.Scalar {
    /// Neither a control or format character, nor one that breaks a line.
    fileprivate var isPrintable: Bool {
        switch properties.generalCategory {
        case .control, .format, .surrogate, .unassigned, .lineSeparator, .paragraphSeparator: false
        default: true
        }
    }

    fileprivate var escaped: String {
        "\\u{\(String(value, radix: 16))}"
    }

    fileprivate var paddedHexadecimal: String {
        let digits = String(value, radix: 16, uppercase: true)
        return String(repeating: "0", count: max(0, 4 - digits.utf8.count)) + digits
    }
}
