import ArgumentParser
import Control
import Glibc

/// The command: translates letters to words, parses the words, asks the daemon, prints, and ends with the errno.
@main
enum Entry {
    static func main() async {
        exit(await status(of: Array(CommandLine.arguments.dropFirst())))
    }

    private static func status(of arguments: [String]) async -> Int32 {
        do throws(UsageError) {
            return try await run(arguments)
        } catch {
            return complain(error)
        }
    }

    private static func run(_ arguments: [String]) async throws(UsageError) -> Int32 {
        // Shells ask for completions in words of their own.
        let isCompletion = arguments.first.map { $0.hasPrefix("---") || $0.hasPrefix("--generate-") } ?? false
        let words = isCompletion ? arguments : try LetterUsage.words(arguments)
        do {
            if let verb = try parse(words) { try await verb.perform() }
            return 0
        } catch let failure as Failure {
            Output.complain(failure.error.line(for: failure.command))
            return failure.status
        } catch let failure as Reported {
            return failure.status
        } catch let error as UsageError {
            throw error
        } catch let error as ControlError {
            Output.complain("qbd: \(error.message)")
            return error.code
        } catch {
            Output.complain("qbd: \(error)")
            return 1
        }
    }

    /// - Returns: nil when all that was asked for was a text, and it is printed.
    private static func parse(_ words: [String]) throws -> (any VerbCommand)? {
        do {
            let command = try Root.parseAsRoot(words)
            if let verb = command as? any VerbCommand { return verb }
            // The parser's own command for help, which throws the text.
            var own = command
            try own.run()
            return nil
        } catch {
            guard Root.exitCode(for: error) == .success else {
                throw UsageError(Root.message(for: error), verb: words.first.flatMap { Verb(word: $0) })
            }
            // Help or a completion script.
            let text = Root.fullMessage(for: error, columns: 80)
            try Output.print(text.hasSuffix("\n") ? text : text + "\n")
            return nil
        }
    }

    private static func complain(_ error: UsageError) -> Int32 {
        Output.complain("qbd: \(error.message)")
        if let verb = error.verb {
            Output.complain("usage: " + verb.usage(indentation: 7))
            Output.complain("'qbd help \(verb.word)' says more")
        } else {
            Output.complain(Help.summary)
        }
        return UsageError.exitStatus
    }
}

/// Only a place for the verbs: what it is asked without one is answered by `Entry`.
struct Root: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "qbd",
        abstract: "Maps block volumes to local disks.",
        subcommands: [
            Map.self, Unmap.self, Remap.self, List.self, MapAll.self, UnmapAll.self, Throttle.self, Suspend.self,
            Resume.self, Info.self, Resize.self, Create.self, Delete.self, Volumes.self, Snapshot.self,
            Clone.self, Version.self, HelpVerb.self,
        ])
}

extension Verb {
    /// Above the options in the help of the verb, which puts "USAGE: " before it and indents what follows.
    var usageText: String { usage(indentation: 7).replacing("\n       ", with: "\n") }
}

/// A verb, parsed.
protocol VerbCommand: ParsableCommand {
    func perform() async throws
}

/// The command failed: its exit status is the errno of the error.
struct Failure: Error {
    let command: Command
    let error: ControlError

    init(_ command: Command, _ error: ControlError) {
        self.command = command
        self.error = error
    }

    /// Shells give numbers from 126 on a meaning of their own.
    var status: Int32 { (1..<126).contains(error.code) ? error.code : 1 }
}

/// The command failed, and has said why.
struct Reported: Error {
    let status: Int32
}
