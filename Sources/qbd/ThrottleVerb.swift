import ArgumentParser
import Control

struct Throttle: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.throttle.word, abstract: "Limit the I/O of a mapped volume.",
        usage: Verb.throttle.usageText,
        discussion: """
            The keys are read_bps, write_bps (bytes per second), read_iops, write_iops (operations per second), bps and \
            iops for both directions, QEMU's bps_rd, bps_wr, iops_rd, iops_wr, and burst_ms, which is --burst. 0 removes a \
            limit; limits that are not named stay. A change holds at once, also for I/O that waits.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @Option(
        name: [.customShort("t"), .long],
        help: ArgumentHelp("Limits: numbers with K, M, G, or 0.", valueName: "key=number,..."))
    var throttle: String?
    @Option(help: ArgumentHelp("How much of its rates the volume may save up for a burst (100).", valueName: "ms"))
    var burst: String?
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        guard throttle != nil || burst != nil else {
            throw UsageError("-t KEY=NUMBER or --burst MS is missing", verb: .throttle)
        }
        let name = try Name.volume(volume, for: .setThrottle)
        let config = try config.explicitPath(for: .setThrottle)
        let limits = try checked(for: .setThrottle) { () throws(ControlError) in
            var limits = ThrottleArgument()
            if let throttle { limits = try ThrottleArgument(parsing: throttle) }
            if let burst { try limits.set("burst_ms", burst, as: "--burst") }
            return limits
        }
        let answer = try await common.ask(SetThrottleRequest(volume: volume, config: config, limits: limits))
        if common.verbose { Output.complain("throttled \(name): \(StatusText.limits(answer))") }
        try Output.answer(.setThrottle, answer, asJSON: common.json) { _ in "" }
    }
}

/// The limits a volume is mapped with; each option has its key in map.conf.
struct LimitOptions: ParsableArguments {
    @Option(help: ArgumentHelp("Limit reads, bytes per second.", valueName: "number"))
    var readBps: String?
    @Option(help: ArgumentHelp("Limit writes, bytes per second.", valueName: "number"))
    var writeBps: String?
    @Option(help: ArgumentHelp("Limit reads, operations per second.", valueName: "number"))
    var readIops: String?
    @Option(help: ArgumentHelp("Limit writes, operations per second.", valueName: "number"))
    var writeIops: String?
    @Option(help: ArgumentHelp("How much of its rates the volume may save up for a burst (100).", valueName: "ms"))
    var burst: String?
}
