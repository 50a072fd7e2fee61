import ArgumentParser
import Control

struct Resize: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.resize.word, abstract: "Grow a volume, mapped or not.",
        usage: Verb.resize.usageText,
        discussion: """
            The device of a mapped volume has the new size when the command returns; then grow what is on it \
            (resize2fs, xfs_growfs). NBD clients of an export see it when they connect next. A volume never shrinks.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @Option(
        name: [.customShort("k"), .long],
        help: "The new size: bytes, or a number with K, M, G, T or P.")
    var size: String?
    @Flag(help: "Take over the size that the volume has at its store, where it grew by other means.")
    var toStoreSize = false
    @Flag(help: "Read the device's partition table again; no partition may be in use.")
    var rescanPartitions = false
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .resize)
        guard (size == nil) == toStoreSize else {
            throw UsageError(
                toStoreSize ? "--size and --to-store-size do not go together" : "the new size is missing", verb: .resize
            )
        }
        let request = ResizeRequest(
            volume: volume, config: try config.explicitPath(for: .resize), defaultConfig: try config.path(for: .resize),
            size: try size.map { (text) throws(UsageError) in try Name.size(text, for: .resize) },
            rescanPartitions: rescanPartitions)
        let grown = try await common.ask(request)
        if common.verbose { Output.complain("\(name) has \(grown.size) bytes") }
        try Output.answer(.resize, grown, asJSON: common.json) { _ in "" }
    }
}
