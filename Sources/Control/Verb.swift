/// What `qbd` can be asked to do: its word, and its documented letter where it has one.
package enum Verb: String, CaseIterable, Sendable {
    case map
    case unmap
    case remap
    case list
    case mapAll = "map-all"
    case unmapAll = "unmap-all"
    case throttle
    case suspend
    case resume
    case info
    case resize
    case create
    case delete
    case volumes
    case snapshot
    case clone
    case version
    case help

    package var word: String { rawValue }

    /// The documented spelling without a word: `-m` and `--map`. Verbs of our own have none.
    package var letters: (short: Character, long: String)? {
        switch self {
        case .map: ("m", "map")
        case .unmap: ("u", "unmap")
        case .remap: ("r", "remap")
        case .list: ("l", "list")
        case .mapAll: ("M", "mapall")
        case .unmapAll: ("U", "unmapall")
        case .throttle: ("s", "setthrottle")
        case .suspend: ("S", "suspend")
        case .resume: ("R", "resume")
        case .info: ("i", "info")
        case .resize: ("z", "resize")
        case .version: ("v", "version")
        case .help: ("h", "help")
        case .create, .delete, .volumes, .snapshot, .clone: nil
        }
    }

    /// Whether the letter takes the volume's name as its value, as in `-m pool/volume`.
    package var letterTakesName: Bool {
        switch self {
        case .map, .unmap, .remap, .throttle, .suspend, .resume, .info, .resize: true
        case .list, .mapAll, .unmapAll, .version, .help, .create, .delete, .volumes, .snapshot, .clone: false
        }
    }

    /// What the verb does, one of several things, in words of their own behind its word.
    package var actions: [String] { self == .snapshot ? ["create", "delete", "rollback", "list"] : [] }

    /// What follows the word, as a usage line shows it.
    package var arguments: String {
        switch self {
        case .map:
            "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] [--export] [--read-only] [--device DEVICE] [LIMITS]"
                + " [--hook PATH|none] [--hook-timeout SECONDS] [--save] [-f FILE]"
        case .unmap:
            "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] [--force]"
                + " [--hook PATH|none] [--hook-timeout SECONDS] [--forget] [-f FILE]"
        case .suspend: "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] [--timeout SECONDS]"
        case .remap, .info: "[tcp://|rdma://]POOL/VOLUME [-c CONFIG]"
        case .list: "[-c CONFIG] [--long]"
        case .mapAll, .unmapAll: "[-f FILE]"
        case .throttle: "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] [-t KEY=NUMBER[,...]] [--burst MS]"
        case .resume: "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] -t normal|error|discard"
        case .resize: "[tcp://|rdma://]POOL/VOLUME [-c CONFIG] -k SIZE|--to-store-size [--rescan-partitions]"
        case .create: "POOL/VOLUME -k SIZE [--block-size 512|4096] [--replicas N] [-c CONFIG]"
        case .delete: "POOL/VOLUME [--snapshots] [--force] [-c CONFIG]"
        case .volumes: "[POOL] [-c CONFIG]"
        case .snapshot: actions.joined(separator: "|") + " POOL/VOLUME[@SNAPSHOT] [-c CONFIG]"
        case .clone: "POOL/VOLUME@SNAPSHOT POOL/NEW [-c CONFIG]"
        case .version: ""
        case .help: "[VERB [ACTION]]"
        }
    }

    /// The right usage in words, and in letters where there are some; one line each, without "usage:".
    package var usage: [String] {
        let tail = arguments.isEmpty ? "" : " " + arguments
        guard let letters, self != .help else { return ["qbd \(word)\(tail)"] }
        return ["qbd \(word)\(tail)", "qbd -\(letters.short)|--\(letters.long)\(tail)"]
    }

    /// ``usage`` for a width of 80 columns, of which the first `indentation` are taken by a title. What a line has no
    /// room for goes on under it; what is in brackets stays together.
    package func usage(indentation: Int) -> String {
        let margin = String(repeating: " ", count: indentation)
        return usage.map { Self.wrapped($0, width: 80 - indentation).joined(separator: "\n\(margin)    ") }
            .joined(separator: "\n\(margin)")
    }

    private static func wrapped(_ text: String, width: Int) -> [String] {
        var lines: [String] = []
        var words: [String] = []
        for word in text.split(separator: " ").map(String.init) {
            if let last = words.last, last.filter({ $0 == "[" }).count > last.filter({ $0 == "]" }).count {
                words[words.count - 1] = "\(last) \(word)"
            } else {
                words.append(word)
            }
        }
        for word in words {
            // Lines behind the first one are indented by four.
            let room = lines.count > 1 ? width - 4 : width
            if let last = lines.last, last.utf8.count + 1 + word.utf8.count <= room {
                lines[lines.count - 1] = "\(last) \(word)"
            } else {
                lines.append(word)
            }
        }
        return lines
    }

    /// The verb of a word.
    package init?(word: String) { self.init(rawValue: word) }

    static func short(_ letter: Character) -> Verb? { allCases.first { $0.letters?.short == letter } }
    static func long(_ name: some StringProtocol) -> Verb? {
        allCases.first { $0.letters.map { $0.long == name } ?? false }
    }
}

/// The command line was not understood: exit status 64.
package struct UsageError: Error, Equatable, Sendable {
    /// What was wrong.
    package let message: String
    /// Whose usage to show; nil for that of the whole command.
    package let verb: Verb?

    package init(_ message: String, verb: Verb? = nil) {
        self.message = message
        self.verb = verb
    }

    /// `EX_USAGE` of sysexits.h.
    package static let exitStatus: Int32 = 64
}
