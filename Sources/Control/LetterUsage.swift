/// The documented usage in letters, `qbd -c conf -m pool/volume`, put into words: `qbd map --config=conf pool/volume`.
///
/// Both spellings run the same code because there is no other code. Letters follow getopt_long: they cluster (`-Vl`),
/// a value may follow its letter directly (`-mpool/volume`), as the next argument, or behind `=` of the long form
/// (`--map=pool/volume`), and their order is free. Exactly one of them is a verb.
package struct LetterUsage {
    /// An option that goes with a verb; it keeps its meaning in words.
    private struct Option {
        let short: Character?
        let long: String
        let takesValue: Bool
    }

    private static let options = [
        Option(short: "c", long: "config", takesValue: true),
        Option(short: "f", long: "file", takesValue: true),
        Option(short: "t", long: "throttle", takesValue: true),
        Option(short: "k", long: "size", takesValue: true),
        Option(short: "V", long: "verbose", takesValue: false),
        Option(short: nil, long: "block-size", takesValue: true),
        Option(short: nil, long: "socket", takesValue: true),
        Option(short: nil, long: "timeout", takesValue: true),
        Option(short: nil, long: "device", takesValue: true),
        Option(short: nil, long: "hook", takesValue: true),
        Option(short: nil, long: "hook-timeout", takesValue: true),
        Option(short: nil, long: "save", takesValue: false),
        Option(short: nil, long: "forget", takesValue: false),
        Option(short: nil, long: "read-bps", takesValue: true),
        Option(short: nil, long: "write-bps", takesValue: true),
        Option(short: nil, long: "read-iops", takesValue: true),
        Option(short: nil, long: "write-iops", takesValue: true),
        Option(short: nil, long: "burst", takesValue: true),
        Option(short: nil, long: "export", takesValue: false),
        Option(short: nil, long: "long", takesValue: false),
        Option(short: nil, long: "force", takesValue: false),
        Option(short: nil, long: "read-only", takesValue: false),
        Option(short: nil, long: "json", takesValue: false),
        Option(short: nil, long: "to-store-size", takesValue: false),
        Option(short: nil, long: "rescan-partitions", takesValue: false),
    ]

    private var rest: ArraySlice<String>
    private var verb: (verb: Verb, spelling: String)?
    private var wantsHelp = false
    private var name: String?
    private var translated: [String] = []

    private init(_ arguments: [String]) { rest = arguments[...] }

    /// - Parameter arguments: the command line without the command's own name.
    /// - Returns: the same in words, the verb first. What is in words already is returned as it is, but for options
    ///   in front of the verb, which go behind it. An empty command line, and one that only asks for help, is
    ///   `["help"]`, with the verb behind it when there was one.
    package static func words(_ arguments: [String]) throws(UsageError) -> [String] {
        var usage = LetterUsage(arguments)
        return try usage.translate()
    }

    private mutating func translate() throws(UsageError) -> [String] {
        while let argument = rest.popFirst() {
            if argument.hasPrefix("--"), argument != "--" {
                try takeLong(argument)
            } else if argument.hasPrefix("-"), argument != "-", argument != "--" {
                try takeCluster(argument)
            } else if let verb {
                throw UsageError("unexpected argument '\(argument)' beside \(verb.spelling)", verb: verb.verb)
            } else if let word = Verb(word: argument) {
                return wantsHelp ? ["help", word.word] : [word.word] + translated + rest
            } else {
                throw UsageError("there is no verb '\(argument)'")
            }
        }
        guard let verb else {
            if wantsHelp { return ["help"] }
            throw UsageError(translated.isEmpty ? "a verb is missing" : "a verb is missing beside the options")
        }
        if wantsHelp { return ["help", verb.verb.word] }
        var words = [verb.verb.word] + translated
        if let name {
            // Behind "--" nothing is an option, so that a name is never taken for one.
            words += name.hasPrefix("-") ? ["--", name] : [name]
        }
        return words
    }

    private mutating func takeLong(_ argument: String) throws(UsageError) {
        let parts = argument.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        let long = String(parts[0])
        let value = parts.count > 1 ? String(parts[1]) : nil
        if let verb = Verb.long(long) {
            try take(verb, spelling: "--\(long)", attached: value)
        } else if let option = Self.options.first(where: { $0.long == long }) {
            try take(option, spelling: "--\(long)", attached: value)
        } else {
            throw UsageError("unknown option '--\(long)'", verb: verb?.verb)
        }
    }

    private mutating func takeCluster(_ argument: String) throws(UsageError) {
        var letters = argument.dropFirst()
        while let letter = letters.popFirst() {
            let attached = letters.isEmpty ? nil : String(letters)
            if let verb = Verb.short(letter) {
                try take(verb, spelling: "-\(letter)", attached: verb.letterTakesName ? attached : nil)
                if verb.letterTakesName { return }
            } else if let option = Self.options.first(where: { $0.short == letter }) {
                try take(option, spelling: "-\(letter)", attached: option.takesValue ? attached : nil)
                if option.takesValue { return }
            } else {
                throw UsageError("unknown option '-\(letter)'", verb: verb?.verb)
            }
        }
    }

    private mutating func take(_ found: Verb, spelling: String, attached: String?) throws(UsageError) {
        if found == .help {
            if attached != nil { throw UsageError("\(spelling) takes no value", verb: verb?.verb) }
            wantsHelp = true
            return
        }
        if let verb {
            throw UsageError("\(verb.spelling) and \(spelling) are both verbs: give exactly one", verb: verb.verb)
        }
        verb = (found, spelling)
        if found.letterTakesName {
            guard let value = attached ?? rest.popFirst() else {
                throw UsageError("\(spelling) needs a volume's name: pool/volume", verb: found)
            }
            name = value
        } else if attached != nil {
            throw UsageError("\(spelling) takes no value", verb: found)
        }
    }

    private mutating func take(_ option: Option, spelling: String, attached: String?) throws(UsageError) {
        guard option.takesValue else {
            if attached != nil { throw UsageError("\(spelling) takes no value", verb: verb?.verb) }
            translated.append("--\(option.long)")
            return
        }
        guard let value = attached ?? rest.popFirst() else {
            throw UsageError("\(spelling) needs a value", verb: verb?.verb)
        }
        translated.append("--\(option.long)=\(value)")
    }
}
