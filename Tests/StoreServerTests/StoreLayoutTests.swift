import PureFlash
import StoreServer
import Testing

/// What a store does with a command, before anything is done for it.
@Suite struct StoreLayoutTests {
    static let id: UInt64 = 0x4200_0000
    static let object = StoreProtocol.objectSize
    static let shard = StoreProtocol.shardSize
    /// Three shards, the second of which is another store's, and 4 KiB in the third.
    static let layout = StoreLayout(id: id, size: 2 * shard + 4096, metaVersion: 7, shards: [true, false, true])

    static func command(
        _ opcode: StoreCommand.Opcode = .read, at offset: UInt64 = 0, _ length: UInt32 = 4096, id: UInt64 = id,
        metaVersion: UInt16 = 7, snapshot: UInt32 = StoreProtocol.head
    ) -> StoreCommand {
        StoreCommand(
            opcode, id: 1, volumeID: id, metaVersion: metaVersion, offset: offset, length: length, snapshot: snapshot)
    }

    /// Snapshot 3 was made when the volume had 1 MiB.
    static func verdict(_ command: StoreCommand) -> StoreStatus {
        layout.verdict(on: command) { $0 == 3 ? 1 << 20 : nil }
    }

    @Test(arguments: [StoreCommand.Opcode.read, .write])
    func goodOnes(opcode: StoreCommand.Opcode) {
        for (offset, length) in [
            (0, 512), (0, 131_072), (Self.object - 131_072, 131_072), (Self.shard - 512, 512), (2 * Self.shard, 4096),
            (2 * Self.shard + 3584, 512), (512, 0),
        ] as [(UInt64, UInt32)] {
            #expect(Self.verdict(Self.command(opcode, at: offset, length)) == .success, "\(length) bytes at \(offset)")
        }
    }

    @Test(arguments: [StoreCommand.Opcode.read, .write])
    func outOfBounds(opcode: StoreCommand.Opcode) {
        let end = Self.layout.size
        for (offset, length) in [
            (end, 512), (end - 512, 1024), (end + 512, 512), (3 * Self.shard, 512), (1 << 63, 512), (.max - 511, 512),
        ] as [(UInt64, UInt32)] {
            #expect(Self.verdict(Self.command(opcode, at: offset, length)) == .lbaRange, "\(length) bytes at \(offset)")
        }
    }

    @Test(
        arguments: [
            (0, 131_584), (0, .max), (0, 511), (1, 512), (256, 256), (object - 512, 1024), (shard - 4096, 8192),
            (.max - 511, 1024), (.max, 512),
        ] as [(UInt64, UInt32)])
    func malformed(offset: UInt64, length: UInt32) {
        #expect(Self.verdict(Self.command(at: offset, length)) == .invalidField)
        #expect(Self.verdict(Self.command(.write, at: offset, length)) == .invalidField)
    }

    @Test(arguments: [0, 3, 4, 5, 13, 14, 255] as [UInt8])
    func unknownOpcodes(opcode: UInt8) {
        var command = Self.command(at: 1, .max, id: 1, metaVersion: 9)
        command.opcode = opcode
        #expect(Self.verdict(command) == .invalidOpcode, "before anything else is looked at")
    }

    @Test func anothersShard() {
        #expect(Self.verdict(Self.command(at: Self.shard)) == StoreStatus(rawValue: 0x40C0))
        #expect(Self.verdict(Self.command(.write, at: 2 * Self.shard - 512, 512)) == StoreStatus(rawValue: 0x40C0))
        // Nothing is touched by it.
        #expect(Self.verdict(Self.command(at: Self.shard, 0)) == .success)
    }

    @Test func aShardTheConductorDidNotSpeakOf() {
        let layout = StoreLayout(id: Self.id, size: 2 * Self.shard, metaVersion: 7, shards: [true])
        #expect(layout.verdict(on: Self.command(at: Self.shard)) { _ in nil } == StoreStatus(rawValue: 0x40C0))
    }

    @Test func staleViews() {
        for version in [0, 6, 8, .max] as [UInt16] {
            #expect(Self.verdict(Self.command(metaVersion: version)) == StoreStatus(rawValue: 0x4000))
        }
        #expect(Self.verdict(Self.command(id: Self.id + (1 << 24))) == StoreStatus(rawValue: 0x4009))
    }

    @Test func snapshots() {
        #expect(Self.verdict(Self.command(snapshot: 3)) == .success)
        #expect(Self.verdict(Self.command(at: 1 << 20, snapshot: 3)) == .lbaRange, "it ends where the volume did")
        #expect(Self.verdict(Self.command(snapshot: 4)) == StoreStatus(rawValue: 0x4009), "it may be opened")
        #expect(Self.verdict(Self.command(snapshot: 0)) == StoreStatus(rawValue: 0x4009))
        #expect(Self.verdict(Self.command(.write, snapshot: 3)) == .readOnly)
        #expect(Self.verdict(Self.command(.write, snapshot: 4)) == .readOnly)
    }
}
