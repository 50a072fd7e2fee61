import ArgumentParser
import Control

// Verbs whose usage is documented and whose work a later version does. They check all they are given, then say so.

struct Throttle: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.throttle.word, abstract: "Limit the I/O of a mapped volume (a later version).",
        usage: Verb.throttle.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @Option(
        name: [.customShort("t"), .long],
        help: ArgumentHelp(
            "read_bps, write_bps, read_iops, write_iops = a number; 0 removes a limit.", valueName: "key=number,..."))
    var throttle: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .setThrottle)
        let config = try config.explicitPath(for: .setThrottle)
        let limits = try checked(for: .setThrottle) { () throws(ControlError) in
            try ThrottleArgument(parsing: throttle)
        }
        _ = try await common.ask(SetThrottleRequest(volume: volume, config: config, limits: limits))
    }
}

struct Suspend: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.suspend.word, abstract: "Hold back the I/O of a mapped volume (a later version).",
        usage: Verb.suspend.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .suspend)
        let config = try config.explicitPath(for: .suspend)
        _ = try await common.ask(SuspendRequest(volume: volume, config: config))
    }
}

struct Resume: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.resume.word, abstract: "Let held-back I/O go on, fail, or be discarded (a later version).",
        usage: Verb.resume.usageText)

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
        _ = try Name.volume(volume, for: .resume)
        let config = try config.explicitPath(for: .resume)
        let mode = try checked(for: .resume) { () throws(ControlError) in try ResumeMode(parsing: throttle) }
        _ = try await common.ask(ResumeRequest(volume: volume, config: config, mode: mode))
    }
}
