import PureFlash

/// What a store knows of a volume from the conductor.
package struct StoreLayout: Sendable, Equatable {
    package var id: UInt64
    /// Bytes.
    package var size: UInt64
    package var metaVersion: UInt16
    /// For each shard of the volume, whether this store serves it.
    package var shards: [Bool]

    package init(id: UInt64, size: UInt64, metaVersion: UInt16, shards: [Bool]) {
        self.id = id
        self.size = size
        self.metaVersion = metaVersion
        self.shards = shards
    }

    /// Whether a command may be done: everything the real engine leaves unchecked, and what it checks.
    /// - Parameter sizeOfSnapshot: bytes of the snapshot of this number; nil when there is none that was opened.
    @inline(__always)
    package func verdict(on command: StoreCommand, sizeOfSnapshot: (UInt32) -> UInt64?) -> StoreStatus {
        let isWrite = command.opcode == StoreCommand.Opcode.write.rawValue
        guard isWrite || command.opcode == StoreCommand.Opcode.read.rawValue else { return .invalidOpcode }
        if command.volumeID != id { return StoreStatus.invalidState.withReopen }
        if command.metaVersion != metaVersion { return StoreStatus.success.withReopen }
        if command.length > StoreProtocol.maximumTransfer { return .invalidField }
        if (command.offset | UInt64(command.length)) & UInt64(StoreProtocol.sector &- 1) != 0 { return .invalidField }
        let within = command.offset & (StoreProtocol.objectSize &- 1)
        if within &+ UInt64(command.length) > StoreProtocol.objectSize { return .invalidField }
        var size = size
        if command.snapshot != StoreProtocol.head {
            if isWrite { return .readOnly }
            // It was, before the store was started or for another client, and is there when it is opened again.
            guard let snapshot = sizeOfSnapshot(command.snapshot) else { return StoreStatus.invalidState.withReopen }
            size = snapshot
        }
        // The length is small, and an offset near the largest number is unaligned or crosses its object.
        if command.offset > size || UInt64(command.length) > size &- command.offset { return .lbaRange }
        let shard = Int(truncatingIfNeeded: command.offset / StoreProtocol.shardSize)
        if command.length > 0, shard >= shards.count || !shards[shard] {
            return StoreStatus.notPrimary.withReopen
        }
        return .success
    }
}
