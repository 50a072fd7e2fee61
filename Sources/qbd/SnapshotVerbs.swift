import ArgumentParser
import Configuration
import Control

/// Only a place for what can be done with snapshots.
struct Snapshot: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.snapshot.word, abstract: "Make, list, delete, or return to snapshots of a volume.",
        usage: Verb.snapshot.usageText,
        discussion: """
            A snapshot, pool/volume@snapshot, keeps what a volume holds at that moment, and costs what is changed later. \
            It is mapped as a volume is, and can only be read; a clone of it can be written.
            """,
        subcommands: [SnapshotCreate.self, SnapshotDelete.self, SnapshotRollback.self, SnapshotList.self])
}

/// A snapshot's name and what belongs to it.
struct SnapshotArguments: ParsableArguments {
    @Argument(help: ArgumentHelp("pool/volume@snapshot", valueName: "snapshot"))
    var snapshot: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func name(for command: Command) throws(Failure) -> VolumeName {
        try checked(for: command) { () throws(ControlError) in
            try VolumeName.reachable(snapshot, snapshot: .required)
        }
    }
}

struct SnapshotCreate: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", abstract: "Make a snapshot of a volume, mapped or not.",
        discussion: "Everything acknowledged before is in it. I/O of a mapped volume pauses, and nothing of it fails.")

    @OptionGroup var arguments: SnapshotArguments

    func perform() async throws {
        let name = try arguments.name(for: .createSnapshot)
        let made = try await arguments.common.ask(
            CreateSnapshotRequest(
                snapshot: "\(name)", config: try arguments.config.explicitPath(for: .createSnapshot),
                defaultConfig: try arguments.config.path(for: .createSnapshot)))
        if arguments.common.verbose { Output.complain("made \(made.snapshot) id=\(made.id) size=\(made.size)") }
        try Output.answer(.createSnapshot, made, asJSON: arguments.common.json) { _ in "" }
    }
}

struct SnapshotDelete: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: "delete", abstract: "Delete a snapshot, in any order.",
        discussion:
            "Refused with exit status 16 while it is mapped. Clones of it stay. Space is freed in the background.")

    @OptionGroup var arguments: SnapshotArguments

    func perform() async throws {
        let name = try arguments.name(for: .deleteSnapshot)
        let done = try await arguments.common.ask(
            DeleteSnapshotRequest(
                snapshot: "\(name)", config: try arguments.config.explicitPath(for: .deleteSnapshot),
                defaultConfig: try arguments.config.path(for: .deleteSnapshot)))
        if arguments.common.verbose { Output.complain("deleted \(name)") }
        try Output.answer(.deleteSnapshot, done, asJSON: arguments.common.json) { _ in "" }
    }
}

struct SnapshotRollback: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: "rollback", abstract: "Give the volume the contents and size that the snapshot has.",
        discussion: """
            Refused with exit status 16 while the volume is mapped. What was written since is lost; all snapshots stay, \
            newer ones too.
            """)

    @OptionGroup var arguments: SnapshotArguments

    func perform() async throws {
        let name = try arguments.name(for: .rollback)
        let done = try await arguments.common.ask(
            RollbackRequest(
                snapshot: "\(name)", config: try arguments.config.explicitPath(for: .rollback),
                defaultConfig: try arguments.config.path(for: .rollback)))
        if arguments.common.verbose { Output.complain("\(name.pool)/\(name.volume) is as \(name) is") }
        try Output.answer(.rollback, done, asJSON: arguments.common.json) { _ in "" }
    }
}

struct SnapshotList: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: "list", abstract: "List the snapshots of a volume, oldest first.",
        discussion: """
            A header and one line a snapshot, fields separated by blanks, none empty: snap_id snapshot size created. \
            Sizes are bytes.
            """)

    @Argument(help: ArgumentHelp("pool/volume", valueName: "volume"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        _ = try Name.volume(volume, for: .snapshots)
        let answer = try await common.ask(
            SnapshotsRequest(
                volume: volume, config: try config.explicitPath(for: .snapshots),
                defaultConfig: try config.path(for: .snapshots)))
        try Output.answer(.snapshots, answer.snapshots, asJSON: common.json) { SnapshotTable.text($0) }
    }
}

struct Clone: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.clone.word, abstract: "Make a volume of a snapshot.",
        usage: Verb.clone.usageText,
        discussion: """
            The new volume, of the same pool, begins with the contents of the snapshot and takes space for what is \
            written to it. The snapshot and its volume can be deleted; the clone keeps what it needs.
            """)

    @Argument(help: ArgumentHelp("pool/volume@snapshot", valueName: "snapshot"))
    var snapshot: String
    @Argument(help: ArgumentHelp("pool/volume, the new one", valueName: "new"))
    var volume: String
    @OptionGroup var config: ConfigOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let from = try checked(for: .clone) { () throws(ControlError) in
            try VolumeName.reachable(snapshot, snapshot: .required)
        }
        let new = try Name.volume(volume, for: .clone)
        guard from.pool == new.pool else {
            throw Failure(
                .clone, .invalid("\(from) and \(new) are of different pools, and a clone shares its snapshot's data"))
        }
        let config = try config.path(for: .clone)
        let made = try await common.ask(CloneRequest(snapshot: "\(from)", volume: volume, config: config))
        if common.verbose { Output.complain("made \(made.volume) id=\(made.volumeID) size=\(made.size)") }
        try Output.answer(.clone, made, asJSON: common.json) { _ in "" }
    }
}
