import Backend
import Configuration
import EventLoop
import Glibc
import LocalPool
import PureFlash
import Synchronization

/// A pool of the configuration, and what the conductor keeps beside its volumes.
final class StorePool: Sendable {
    /// What only the conductor knows of a volume.
    struct Entry: Sendable {
        var id: UInt64
        var metaVersion: UInt16 = 0
        /// Addresses; shard n is served by number n modulo their count.
        var stores: [String]
        var snapshots: [Snapshot] = []
        /// The number of the next snapshot; no number is used again.
        var nextSnapshot: UInt32 = 1
        /// Names of snapshots that a store was told to make and that are not in `snapshots`: it may have made them.
        var begun: [String] = []
        /// Stores that may have made this volume after its creation had failed. There is no such volume then.
        var suspects: [String] = []
        /// Those there are, where a fault switch has the volume grow without more.
        var shards: Int?
        /// Stores that were written off, for a fault switch: the volume's shards there are served by nobody.
        var writtenOff: [String] = []
        /// Of a volume that a conductor elsewhere had made here: its id there.
        var origin: UInt64?
    }

    struct Snapshot: Sendable {
        var name: String
        var number: UInt32
        /// Bytes.
        var size: UInt64
    }

    let name: String
    let volumes: any VolumePool
    /// Of a local pool, where each volume's entry is the file `VOLUME.pureflash`.
    let path: String?
    /// Of a memory pool.
    private let entries = Mutex<[String: Entry]>([:])
    /// The address of the conductor's own store, which serves volumes that were made without a conductor.
    private let own: String

    /// - Parameter report: takes lines for the log, on any thread.
    init(_ configuration: PoolConfiguration, own: String, report: @escaping @Sendable (String) -> Void) {
        self.own = own
        name = configuration.name
        switch configuration.kind {
        case .local(let path):
            volumes = LocalPool(name: configuration.name, path: path, report: report)
            self.path = path
        default:
            volumes = MemoryPool(name: configuration.name)
            path = nil
        }
    }

    func record(_ volume: String) throws(BackendError) -> VolumeRecord {
        guard let record = try find(volume) else {
            throw BackendError(code: ENOENT, message: "no volume \(volume) in tenant \(name)")
        }
        return record
    }

    /// Nil when there is no such volume. EUCLEAN when there is something of that name that cannot be read.
    func find(_ volume: String) throws(BackendError) -> VolumeRecord? {
        if let record = try volumes.list().first(where: { $0.volume == volume }) { return record }
        if let damaged = try volumes.damaged().first(where: { $0.volume == volume }) {
            throw BackendError(code: EUCLEAN, message: "\(name)/\(volume) is damaged: \(damaged.reason)")
        }
        return nil
    }

    // MARK: Entries

    private static func file(_ volume: String) -> String { volume + ".pureflash" }
    private static let version = "1"
    /// Stands for the conductor's own store, whose address may change.
    private static let ownStore = "self"

    /// Where the entry of a volume is; nil when it is in memory.
    func entryPath(_ volume: String) -> String? { path.map { "\($0)/\(Self.file(volume))" } }

    func entry(_ record: VolumeRecord) throws(BackendError) -> Entry {
        guard let path else {
            return entries.withLock { entries in
                if let entry = entries[record.volume] { return entry }
                // The ids of different memory pools are the same.
                let entry = Entry(id: UInt64.random(in: 1..<(1 << 38)) << 24, stores: [own])
                entries[record.volume] = entry
                return entry
            }
        }
        // One that a volume of the same name has left says nothing of this one.
        guard let entry = try read(record.volume, in: path), entry.id == record.id else {
            return Entry(id: record.id, stores: [own])
        }
        return entry
    }

    /// What is known of a volume whose creation failed and that stores may have; nil when there is no such.
    func leftover(_ volume: String) throws(BackendError) -> Entry? {
        let entry = if let path { try read(volume, in: path) } else { entries.withLock { $0[volume] } }
        guard let entry, !entry.suspects.isEmpty, try find(volume) == nil else { return nil }
        return entry
    }

    private func read(_ volume: String, in path: String) throws(BackendError) -> Entry? {
        let directory = try Directory(path: path)
        let bytes: [UInt8]
        do throws(BackendError) { bytes = try directory.read(Self.file(volume)) } catch {
            guard error.code == ENOENT else { throw error }
            return nil
        }
        return try parse(bytes, "\(path)/\(Self.file(volume))")
    }

    func keep(_ entry: Entry, of volume: String) throws(BackendError) {
        guard let path else { return entries.withLock { $0[volume] = entry } }
        let directory = try Directory(path: path)
        let draft = Self.file(volume) + ".new"
        var text = """
            # What the conductor of qbd-store knows of this volume
            version = \(Self.version)
            id = 0x\(String(entry.id, radix: 16))
            meta_ver = \(entry.metaVersion)
            stores = \(entry.stores == [own] ? Self.ownStore : entry.stores.joined(separator: ","))
            snap_seq = \(entry.nextSnapshot)
            snapshots = \(entry.snapshots.map { "\($0.name):\($0.number):\($0.size)" }.joined(separator: ","))

            """
        if !entry.begun.isEmpty { text += "begun = \(entry.begun.joined(separator: ","))\n" }
        if !entry.suspects.isEmpty { text += "suspects = \(entry.suspects.joined(separator: ","))\n" }
        if !entry.writtenOff.isEmpty { text += "written_off = \(entry.writtenOff.joined(separator: ","))\n" }
        if let shards = entry.shards { text += "shards = \(shards)\n" }
        if let origin = entry.origin { text += "origin = 0x\(String(origin, radix: 16))\n" }
        try directory.write(text, to: draft)
        try directory.rename(draft, to: Self.file(volume))
        try directory.synchronize()
    }

    func forget(_ volume: String) throws(BackendError) {
        guard let path else {
            entries.withLock { $0[volume] = nil }
            return
        }
        try Directory(path: path).remove(Self.file(volume))
    }

    private func parse(_ bytes: [UInt8], _ file: String) throws(BackendError) -> Entry {
        var values: [String: String] = [:]
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where !line.hasPrefix("#") {
            let parts = line.split(separator: "=", maxSplits: 1).map { $0.filter { $0 != " " } }
            if parts.count == 2 { values[parts[0]] = parts[1] }
        }
        func list(_ key: String) -> [String] { values[key]?.split(separator: ",").map(String.init) ?? [] }
        func hexadecimal(_ key: String) -> UInt64? { values[key].flatMap { UInt64($0.dropFirst(2), radix: 16) } }
        guard values["version"] == Self.version, let id = hexadecimal("id"),
            let metaVersion = values["meta_ver"].flatMap({ UInt16($0) }),
            case let stores = list("stores").map({ $0 == Self.ownStore ? own : $0 }), !stores.isEmpty,
            let nextSnapshot = values["snap_seq"].flatMap({ UInt32($0) }),
            let texts = values["snapshots"]?.split(separator: ","),
            case let snapshots = texts.compactMap(Self.snapshot),
            snapshots.count == texts.count
        else {
            throw BackendError(
                code: EIO,
                message: "\(file) is damaged: it says which stores hold the volume; restore it, or write it anew")
        }
        return Entry(
            id: id, metaVersion: metaVersion, stores: stores, snapshots: snapshots, nextSnapshot: nextSnapshot,
            begun: list("begun"), suspects: list("suspects"), shards: values["shards"].flatMap { Int($0) },
            writtenOff: list("written_off"), origin: hexadecimal("origin"))
    }

    private static func snapshot(_ text: Substring) -> Snapshot? {
        let parts = text.split(separator: ":")
        guard parts.count == 3, let number = UInt32(parts[1]), let size = UInt64(parts[2]) else { return nil }
        return Snapshot(name: String(parts[0]), number: number, size: size)
    }
}
