import ArgumentParser
import Control

struct Suspend: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.suspend.word, abstract: "Hold back the I/O of a mapped volume.",
        usage: Verb.suspend.usageText,
        discussion: """
            Returns when no I/O is in flight at the store. With --timeout, 30 seconds if not said otherwise, it gives up \
            after that time: exit status 110, and the volume is as it was. 'qbd resume' is the way back.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    /// What the daemon's answer may take longer than the suspension.
    private static let margin = Duration.seconds(10)

    func perform() async throws {
        let name = try Name.volume(volume, for: .suspend)
        let config = try config.explicitPath(for: .suspend)
        let timeout = try common.givenTimeout(for: .suspend) ?? .seconds(SuspendRequest.defaultTimeout)
        let done = try await common.ask(
            SuspendRequest(volume: volume, config: config, timeout: UInt64(timeout.components.seconds)),
            within: timeout + Self.margin)
        if common.verbose { Output.complain("suspended \(name)") }
        try Output.answer(.suspend, done, asJSON: common.json) { _ in "" }
    }
}

struct Resume: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.resume.word, abstract: "Let held-back I/O go on, fail, or be discarded.",
        usage: Verb.resume.usageText,
        discussion: """
            Held-back and all later I/O: normal, runs, in its order; error, fails with EIO; discard, succeeds, but writes \
            go nowhere and reads return zeros, which loses data. 'qbd resume -t normal' is the way back from each.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @Option(
        name: [.customShort("t"), .long],
        help: ArgumentHelp("normal, error or discard.", valueName: "mode"),
        completion: .list(ResumeMode.allCases.map(\.rawValue)))
    var throttle: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .resume)
        let config = try config.explicitPath(for: .resume)
        let mode = try checked(for: .resume) { () throws(ControlError) in try ResumeMode(parsing: throttle) }
        let done = try await common.ask(ResumeRequest(volume: volume, config: config, mode: mode))
        if let warning = done.warning { Output.complain("qbd: warning: \(warning)") }
        if common.verbose { Output.complain("resumed \(name), \(mode.rawValue)") }
        try Output.answer(.resume, done, asJSON: common.json) { _ in "" }
    }
}
