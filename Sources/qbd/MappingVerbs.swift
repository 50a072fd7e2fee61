import ArgumentParser
import Configuration
import Control

struct Map: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.map.word, abstract: "Map a volume.",
        usage: Verb.map.usageText,
        discussion: """
            The volume becomes the block device /dev/qbdN, which is printed, with the link /dev/qbd/pool/volume. With \
            --export it is served over NBD instead, without a kernel device, and the URI to reach it is printed. \
            Mapping what is mapped already in the same way changes nothing and is a success.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @Flag(help: "Serve it over NBD, without a kernel device.")
    var export = false
    @Flag(help: "Refuse writes.")
    var readOnly = false
    @Option(help: ArgumentHelp("The kernel device to use instead of any that is free.", valueName: "/dev/nbdX"))
    var device: String?
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .map)
        let config = try config.path(for: .map)
        guard !export || device == nil else {
            throw UsageError("--export makes no device, so --device does not go with it", verb: .map)
        }
        let mapping = try await common.ask(
            MapRequest(volume: volume, config: config, readOnly: readOnly, export: export, device: device))
        if common.verbose {
            Output.complain(
                "mapped \(mapping.volume) id=\(mapping.volumeID) size=\(mapping.size) block_size=\(mapping.blockSize)"
                    + " protocol=\(mapping.transport) read_only=\(mapping.readOnly) config=\(mapping.config)")
        }
        try Output.answer(.map, mapping, asJSON: common.json) { [export] mapping in
            export ? mapping.uri + "\n" : "/dev/\(mapping.device)\n"
        }
    }
}

struct Unmap: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.unmap.word, abstract: "Unmap a volume.",
        usage: Verb.unmap.usageText,
        discussion: "Not mapped is exit status 25, in use is exit status 16. With -c it must be mapped with that file.")

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @Flag(help: "Also when it is in use: its users' I/O fails, and what they did not flush is lost.")
    var force = false
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .unmap)
        let config = try config.explicitPath(for: .unmap)
        let done = try await common.ask(UnmapRequest(volume: volume, config: config, force: force))
        if common.verbose { Output.complain("unmapped \(name)") }
        try Output.answer(.unmap, done, asJSON: common.json) { _ in "" }
    }
}

struct Remap: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.remap.word, abstract: "Give a mapped volume fresh connections.",
        usage: Verb.remap.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .remap)
        let config = try config.explicitPath(for: .remap)
        let done = try await common.ask(RemapRequest(volume: volume, config: config))
        if common.verbose { Output.complain("remapped \(name)") }
        try Output.answer(.remap, done, asJSON: common.json) { _ in "" }
    }
}

struct List: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.list.word, abstract: "List every mapped volume.",
        usage: Verb.list.usageText,
        discussion: """
            A header and one line a volume, fields separated by blanks, none empty: dev_id vol_id device volume config \
            read_bps write_bps read_iops write_iops. The device is - for a volume that is only exported.
            """)

    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        // The documented usage has -c; every volume is listed, whichever file it was mapped with.
        _ = try config.explicitPath(for: .list)
        let answer = try await common.ask(ListRequest())
        try Output.answer(.list, answer.mappings, asJSON: common.json) { MappingTable.text($0) }
    }
}

struct Info: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.info.word,
        abstract: "Show all that is known of a mapped volume: state, clients, counters, latency.",
        usage: Verb.info.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .info)
        let config = try config.explicitPath(for: .info)
        let status = try await common.ask(InfoRequest(volume: volume, config: config))
        try Output.answer(.info, status, asJSON: common.json) { StatusText.text($0) }
    }
}
