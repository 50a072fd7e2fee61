import ArgumentParser
import Configuration
import Control

struct Create: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.create.word, abstract: "Create a volume, all zeros.",
        usage: Verb.create.usageText,
        discussion: "Prints nothing; with --json what was created.")

    @Argument(help: ArgumentHelp("pool/volume", valueName: "volume"))
    var volume: String
    @Option(
        name: [.customShort("k"), .long],
        help: "Bytes, or a number with K, M, G, T or P; a multiple of the block size.")
    var size: String
    @Option(help: ArgumentHelp("The smallest I/O in bytes, 512 or 4096 (512).", valueName: "bytes"))
    var blockSize: String?
    @Option(help: ArgumentHelp("Copies that a cluster keeps of its data, 1 to 3 (1).", valueName: "number"))
    var replicas: Int?
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .create)
        let bytes = try Name.size(size, for: .create)
        let block: UInt32
        switch blockSize {
        case nil, "512": block = 512
        case "4096", "4K", "4k": block = 4096
        case let other?: throw Failure(.create, .invalid("the block size is 512 or 4096, not '\(other)'"))
        }
        guard bytes.isMultiple(of: UInt64(block)) else {
            throw Failure(
                .create, .invalid("the size, \(bytes) bytes, is not a multiple of the block size, \(block) bytes"))
        }
        if let replicas, !(1...3).contains(replicas) {
            throw Failure(.create, .invalid("a volume has 1 to 3 replicas, not \(replicas)"))
        }
        let config = try config.path(for: .create)
        let created = try await common.ask(
            CreateRequest(volume: volume, config: config, size: bytes, blockSize: block, replicas: replicas))
        if common.verbose { Output.complain("created \(created.volume) id=\(created.volumeID) size=\(created.size)") }
        try Output.answer(.create, created, asJSON: common.json) { _ in "" }
    }
}

struct Delete: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.delete.word, abstract: "Delete a volume and its data.",
        usage: Verb.delete.usageText,
        discussion: """
            Refused with exit status 16 while the volume is mapped, or has snapshots; those of a cluster's volume are \
            deleted with it in any case.
            """)

    @Argument(help: ArgumentHelp("pool/volume", valueName: "volume"), completion: Names.volumes)
    var volume: String
    @Flag(help: "Delete its snapshots too.")
    var snapshots = false
    @Flag(help: "Also when it is damaged: what may still be good of its data goes with it.")
    var force = false
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let name = try Name.volume(volume, for: .delete)
        let config = try config.path(for: .delete)
        let done = try await common.ask(
            DeleteRequest(volume: volume, config: config, snapshots: snapshots, force: force))
        if common.verbose { Output.complain("deleted \(name)") }
        try Output.answer(.delete, done, asJSON: common.json) { _ in "" }
    }
}

struct Volumes: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.volumes.word, abstract: "List the volumes of a pool, or of every pool of the configuration.",
        usage: Verb.volumes.usageText,
        discussion: """
            A header and one line a volume, fields separated by blanks, none empty: vol_id volume size block_size \
            created. Sizes are bytes. What is damaged is named on standard error, with the reason; with --json its \
            numbers are 0, and "damaged" is the reason.
            """)

    @Argument(help: ArgumentHelp("Without it: every pool.", valueName: "pool"), completion: Names.pools)
    var pool: String?
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        if let pool { try Name.checkPool(pool, for: .volumes) }
        let config = try config.path(for: .volumes)
        let answer = try await common.ask(VolumesRequest(pool: pool, config: config))
        try Output.answer(.volumes, common.json ? answer.rows : answer.volumes, asJSON: common.json) {
            VolumeTable.text($0)
        }
        for remark in answer.remarks { Output.complain("qbd: \(remark)") }
        // One pool that cannot be listed does not hide the others; the last one's errno is the exit status.
        for problem in answer.problems.dropLast() { Output.complain(problem.error.line(for: .volumes)) }
        if let last = answer.problems.last { throw Failure(.volumes, last.error) }
    }
}
