import ArgumentParser
import Configuration
import Control
import Glibc

struct Map: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.map.word, abstract: "Map a volume.",
        usage: Verb.map.usageText,
        discussion: """
            The volume becomes the block device /dev/qbdN, which is printed, with the link /dev/qbd/pool/volume. With \
            --export it is served over NBD instead, without a kernel device, and the URI to reach it is printed. \
            Mapping what is mapped already in the same way changes nothing and is a success; other limits are named on \
            stderr, and stay: 'qbd throttle' changes them.
            """)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.volumes)
    var volume: String
    @OptionGroup var config: ConfigOption
    @Flag(help: "Serve it over NBD, without a kernel device.")
    var export = false
    @Flag(help: "Refuse writes.")
    var readOnly = false
    @Option(
        help: ArgumentHelp("The kernel device to use instead of any that is free.", valueName: "/dev/nbdX"),
        completion: .file())
    var device: String?
    @OptionGroup var limits: LimitOptions
    @OptionGroup var hook: HookOptions
    @Flag(help: "Write it into the list of volumes, too, so that map-all maps it.")
    var save = false
    @OptionGroup var file: MapFileOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .map, snapshot: .allowed)
        let path = try config.path(for: .map)
        guard !export || device == nil else {
            throw UsageError("--export makes no device, so --device does not go with it", verb: .map)
        }
        guard save || file.file == nil else {
            throw UsageError("--file is the list of volumes to write to, so it goes with --save", verb: .map)
        }
        var entry = try entry(name, config: path)
        let mapper = Mapper(client: try common.client(for: .map))
        let outcome = try await mapper.map(entry, config: path)
        if let mapping = outcome.mapping {
            if common.verbose {
                Output.complain(mapping.summary)
                let status = try await mapper.ask(
                    InfoRequest(volume: entry.fullName, config: nil), for: .map)
                for (key, value) in StatusText.cluster(status) { Output.complain("\(key) \(value)") }
            }
            try Output.answer(.map, mapping, asJSON: common.json) { $0.place + "\n" }
        }
        var problems = outcome.problems
        if save {
            if let mapping = outcome.mapping { entry.setLimits(mapping.limits) }
            do throws(ControlError) { try file.save(entry) } catch { problems.append(error) }
        }
        try Output.complain(problems)
    }

    /// What the options say, in the keys of map.conf.
    private func entry(_ name: VolumeName, config path: String) throws(Failure) -> MapEntry {
        var entry = MapEntry(name)
        for key in MapKey.allCases {
            let (option, value): (String, String?) =
                switch key {
                case .config: ("--config", path == DaemonConfiguration.defaultPath ? nil : path)
                case .export: ("--export", export ? "1" : nil)
                case .readOnly: ("--read-only", readOnly ? "1" : nil)
                case .device: ("--device", device)
                case .readBytes: ("--read-bps", limits.readBps)
                case .writeBytes: ("--write-bps", limits.writeBps)
                case .readOperations: ("--read-iops", limits.readIops)
                case .writeOperations: ("--write-iops", limits.writeIops)
                case .burst: ("--burst", limits.burst)
                case .hook: ("--hook", hook.hook)
                case .hookTimeout: ("--hook-timeout", hook.hookTimeout)
                }
            guard let value else { continue }
            do throws(ConfigurationError) { try entry.set(key, to: value, as: option) } catch {
                throw Failure(.map, ControlError(error))
            }
        }
        return entry
    }
}

/// With the verbs that run a hook.
struct HookOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Run this program, or none, instead of \(Hook.defaultFolder)/pool/volume if that is there.",
            valueName: "path|none"), completion: .file())
    var hook: String?
    @Option(help: ArgumentHelp("How long the hook may take (60).", valueName: "seconds"))
    var hookTimeout: String?
}

struct Unmap: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.unmap.word, abstract: "Unmap a volume.",
        usage: Verb.unmap.usageText,
        discussion: "Not mapped is exit status 25, in use is exit status 16. With -c it must be mapped with that file.")

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @OptionGroup var config: ConfigOption
    @Flag(help: "Also when it is in use: its users' I/O fails, and what they did not flush is lost.")
    var force = false
    @OptionGroup var hook: HookOptions
    @Flag(help: "Take it out of the list of volumes, too, also when it is not mapped.")
    var forget = false
    @OptionGroup var file: MapFileOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .unmap, snapshot: .allowed)
        guard forget || file.file == nil else {
            throw UsageError("--file is the list of volumes to change, so it goes with --forget", verb: .unmap)
        }
        var entry = MapEntry(name)
        let config = try config.explicitPath(for: .unmap)
        do throws(ConfigurationError) {
            if let config { try entry.set(.config, to: config) }
            if let hook = hook.hook { try entry.set(.hook, to: hook, as: "--hook") }
            if let time = hook.hookTimeout { try entry.set(.hookTimeout, to: time, as: "--hook-timeout") }
        } catch {
            throw Failure(.unmap, ControlError(error))
        }
        let mapper = Mapper(client: try common.client(for: .unmap))
        var problems: [ControlError] = []
        var status: MappingStatus?
        if common.verbose {
            // Why there is nothing to tell, the answer to the unmap says.
            status = try? await mapper.ask(InfoRequest(volume: entry.fullName, config: config), for: .unmap)
        }
        do throws(Failure) {
            problems = try await mapper.unmap(entry, force: force).problems
        } catch {
            if forget, error.error.code == ENOTTY {
                do throws(ControlError) { try file.forget(name) } catch { Output.complain("qbd: \(error.message)") }
            }
            throw error
        }
        if common.verbose {
            Output.complain("unmapped \(name)" + (status.map { " id=\($0.mapping.volumeID)" } ?? ""))
            for (key, value) in status.map({ StatusText.cluster($0) }) ?? [] { Output.complain("\(key) \(value)") }
        }
        try Output.answer(.unmap, Done(), asJSON: common.json) { _ in "" }
        if forget {
            do throws(ControlError) { try file.forget(name) } catch { problems.append(error) }
        }
        try Output.complain(problems)
    }
}

struct Remap: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.remap.word, abstract: "Give a mapped volume fresh connections.",
        usage: Verb.remap.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .remap, snapshot: .allowed)
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

    @Flag(help: "Two more fields: state, and health.")
    var long = false
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        // The documented usage has -c; every volume is listed, whichever file it was mapped with.
        _ = try config.explicitPath(for: .list)
        let answer = try await common.ask(ListRequest())
        try Output.answer(.list, answer.mappings, asJSON: common.json) { MappingTable.text($0, long: long) }
    }
}

struct Info: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.info.word,
        abstract: "Show all that is known of a mapped volume: state, clients, counters, latency.",
        usage: Verb.info.usageText)

    @Argument(help: ArgumentHelp("[tcp://]pool/volume", valueName: "volume"), completion: Names.mapped)
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .info, snapshot: .allowed)
        let config = try config.explicitPath(for: .info)
        let status = try await common.ask(InfoRequest(volume: volume, config: config))
        try Output.answer(.info, status, asJSON: common.json) { StatusText.text($0) }
    }
}
