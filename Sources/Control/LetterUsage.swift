/// The documented usage in letters, `qbd -c conf -m pool/volume`, put into words: `qbd map -c=conf pool/volume`.
///
/// Both spellings run the same code because there is no other code. Letters follow getopt_long: they cluster (`-Vl`),
/// a value may follow its letter directly (`-mpool/volume`), as the next argument, or behind `=` of the long form
/// (`--map=pool/volume`), and their order is free. Exactly one of them is a verb.
///
/// Options keep their spelling, by which the parser's complaints name them, and have their value behind `=`, so that no
/// value is taken for an option. One that takes a value is given once, and the value is not empty: an empty one comes of
/// a variable that is not set.
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
        Option(short: nil, long: "replicas", takesValue: true),
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
        Option(short: nil, long: "snapshots", takesValue: false),
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
    /// Options that take a value, by their long names.
    private var given: Set<String> = []

    private init(_ arguments: [String]) { rest = arguments[...] }

    /// - Parameter arguments: the command line without the command's own name.
    /// - Returns: the same in words, the verb first, and then what is done of several things. Options in front of these
    ///   go behind them; what is no option is left to the parser. A command line that only asks for help is `["help"]`,
    ///   with the verb behind it when there was one.
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
                return try translate(behind: word)
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

    /// The rest of a command line whose verb is a word.
    private mutating func translate(behind word: Verb) throws(UsageError) -> [String] {
        verb = (word, word.word)
        if wantsHelp { return ["help", word.word] + rest.prefix(1).filter(word.actions.contains) }
        var action: String?
        var isHelp = false
        while let argument = rest.popFirst() {
            if argument == "--" {
                translated += [argument] + rest
                break
            } else if try takeOption(argument) {
                continue
            } else if action == nil, !word.actions.isEmpty, !argument.hasPrefix("-") {
                action = argument
            } else {
                isHelp = isHelp || argument == "-h" || argument == "--help"
                translated.append(argument)
            }
        }
        guard !word.actions.isEmpty else { return [word.word] + translated }
        let all = word.actions.dropLast().joined(separator: ", ") + " or " + (word.actions.last ?? "")
        guard let action else {
            if isHelp { return ["help", word.word] }
            throw UsageError("what to do is missing: \(all)", verb: word)
        }
        guard word.actions.contains(action) else {
            throw UsageError("there is no '\(word.word) \(action)'; write \(all)", verb: word)
        }
        return [word.word, action] + translated
    }

    /// - Returns: false for what is none of the options: the parser judges it.
    private mutating func takeOption(_ argument: String) throws(UsageError) -> Bool {
        if argument.hasPrefix("--") {
            let long = argument.dropFirst(2).prefix { $0 != "=" }
            guard Self.options.contains(where: { $0.long == long }) else { return false }
            try takeLong(argument)
            return true
        }
        var letters = argument.dropFirst()
        guard argument.first == "-", !letters.isEmpty else { return false }
        while let letter = letters.popFirst() {
            guard let option = Self.options.first(where: { $0.short == letter }) else { return false }
            if option.takesValue { break }
        }
        try takeCluster(argument)
        return true
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
                let value = attached?.first == "=" ? attached.map { String($0.dropFirst()) } : attached
                try take(option, spelling: "-\(letter)", attached: option.takesValue ? value : nil)
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
            guard !value.hasPrefix("-") || value.contains("/") else {
                throw UsageError("\(spelling) needs a volume's name right behind it, not '\(value)'", verb: found)
            }
            name = value
        } else if attached != nil {
            throw UsageError("\(spelling) takes no value", verb: found)
        }
    }

    private mutating func take(_ option: Option, spelling: String, attached: String?) throws(UsageError) {
        guard option.takesValue else {
            if attached != nil { throw UsageError("\(spelling) takes no value", verb: verb?.verb) }
            translated.append(spelling)
            return
        }
        guard let value = attached ?? nextValue(), !value.isEmpty else {
            throw UsageError("\(spelling) needs a value", verb: verb?.verb)
        }
        guard given.insert(option.long).inserted else {
            throw UsageError("\(spelling) is given twice", verb: verb?.verb)
        }
        translated.append("\(spelling)=\(value)")
    }

    /// Behind a verb that is a word, what looks like another option is none, but for a negative number.
    private mutating func nextValue() -> String? {
        if let verb, verb.spelling == verb.verb.word, let next = rest.first, next.hasPrefix("-") {
            guard next.dropFirst().first?.isNumber == true else { return nil }
        }
        return rest.popFirst()
    }
}
