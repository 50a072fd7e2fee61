import ArgumentParser
import Control

struct Version: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.version.word, abstract: "Print the version of the command, and of the daemon if it answers.",
        usage: Verb.version.usageText)

    @OptionGroup var common: CommonOptions

    private struct Answer: Encodable {
        var qbd: String
        /// Nil, and then absent: no daemon answers.
        var qbdd: String?
        var pid: Int32?
    }

    func perform() async throws {
        var answer = Answer(qbd: ProductVersion.string)
        let client = try common.client(for: .version)
        do throws(ControlError) {
            let daemon = try await client.send(VersionRequest())
            answer.qbdd = daemon.version
            answer.pid = daemon.pid
        } catch {
            // Asking for the command's version is no reason to fail; who wants to know why asks with -V.
            if common.verbose { Output.complain(error.line(for: .version)) }
        }
        try Output.answer(.version, answer, asJSON: common.json) { answer in
            "qbd \(answer.qbd)\nqbdd \(answer.qbdd ?? "- (no answer at \(client.path))")\n"
        }
    }
}

struct HelpVerb: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.help.word, abstract: "Show what qbd can do, or how a verb is used.",
        usage: Verb.help.usageText)

    @Argument(help: ArgumentHelp("Without it: all of them.", valueName: "verb"))
    var verb: String?
    @Argument(help: ArgumentHelp("One of the things that the verb does.", valueName: "action"))
    var action: String?
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        guard let verb else {
            try Output.print(Help.overview)
            return
        }
        guard var command = Root.configuration.subcommands.first(where: { $0._commandName == verb }) else {
            throw UsageError("there is no verb '\(verb)'")
        }
        if let action {
            guard let found = command.configuration.subcommands.first(where: { $0._commandName == action }) else {
                throw UsageError("there is no '\(verb) \(action)'", verb: Verb(word: verb))
            }
            command = found
        }
        let text = Root.helpMessage(for: command, columns: 80)
        try Output.print(text.hasSuffix("\n") ? text : text + "\n")
    }
}
