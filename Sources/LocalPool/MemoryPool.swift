import Backend
import CLinux
import EventLoop
import Glibc
import Synchronization

/// Volumes in memory, gone with the daemon: for benchmarks and tests.
package final class MemoryPool: VolumePool {
    package let name: String
    private let volumes = Mutex<[String: MemoryStore]>([:])

    package init(name: String) { self.name = name }

    package func create(volume: String, size: UInt64, blockSize: UInt32) throws(BackendError) -> VolumeRecord {
        try volumes.withLock { (volumes) throws(BackendError) in
            guard volumes[volume] == nil else {
                throw BackendError(code: EEXIST, message: "\(name)/\(volume) exists already")
            }
            let id = (volumes.values.map(\.record.id).max() ?? 0) + 1 << 24
            let record = VolumeRecord(
                id: id, volume: volume, size: size, blockSize: blockSize, created: Int64(time(nil)))
            volumes[volume] = try MemoryStore(record)
            return record
        }
    }

    package func delete(volume: String, snapshots: Bool, force: Bool) throws(BackendError) {
        try volumes.withLock { (volumes) throws(BackendError) in
            guard let store = volumes[volume] else { throw missing(volume) }
            guard store.users.load(ordering: .relaxed) == 0 else { throw busy(volume) }
            volumes[volume] = nil
        }
    }

    package func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord {
        try volumes.withLock { (volumes) throws(BackendError) in
            guard let store = volumes[volume] else { throw missing(volume) }
            guard store.users.load(ordering: .relaxed) == 0 else { throw busy(volume) }
            return try store.grow(to: size, pool: name)
        }
    }

    package func list() -> [VolumeRecord] {
        volumes.withLock { $0.values.map(\.record).sorted { $0.volume < $1.volume } }
    }

    package func open(volume: String, readOnly: Bool) throws(BackendError) -> any OpenVolume {
        try volumes.withLock { (volumes) throws(BackendError) -> any OpenVolume in
            guard !volume.contains("@") else { throw noSnapshots }
            guard let store = volumes[volume] else { throw missing(volume) }
            guard store.users.load(ordering: .relaxed) == 0 else { throw busy(volume) }
            store.users.store(1, ordering: .relaxed)
            return MemoryOpenVolume(pool: name, store: store, readOnly: readOnly)
        }
    }

    private func missing(_ volume: String) -> BackendError {
        BackendError(
            code: ENOENT, message: "no volume \(volume) in pool \(name); `qbd volumes \(name)` lists what there is")
    }

    private var noSnapshots: BackendError {
        BackendError(
            code: EOPNOTSUPP,
            message: "the volumes of pool \(name) are in memory and have no snapshots; those of pools of type local do")
    }

    private func busy(_ volume: String) -> BackendError {
        BackendError(code: EBUSY, message: "\(name)/\(volume) is in use; unmap it first")
    }
}

/// The bytes of one volume: an area of memory that is spent as it is written, and a mark for each piece that was.
final class MemoryStore: @unchecked Sendable {
    /// Bytes that one mark stands for.
    static let grain = 64 << 10
    /// Address space kept for a volume to grow into, beside its size. A process has 128 TiB in all.
    private static let reserve: UInt64 = 128 << 30

    private let current: Mutex<VolumeRecord>
    /// Bytes of address space at `base`, of which `record.size` are the volume's.
    private let capacity: Int
    let base: UnsafeMutableRawPointer
    let written: UnsafeMutablePointer<Bool>
    /// 0 or 1; changed under the pool's lock, and by close.
    let users = Atomic<Int>(0)
    var record: VolumeRecord { current.withLock { $0 } }

    init(_ record: VolumeRecord) throws(BackendError) {
        let noSpace = BackendError(
            code: ENOMEM, message: "no address space for \(record.size) bytes of \(record.volume) in memory")
        // Where address space is short or counted, the volume gets what it needs and cannot grow.
        guard let (base, capacity) = Self.map(record.size + Self.reserve) ?? Self.map(record.size) else {
            throw noSpace
        }
        guard let marks = calloc((capacity + Self.grain - 1) / Self.grain, MemoryLayout<Bool>.stride) else {
            munmap(base, capacity)
            throw noSpace
        }
        // A daemon that locks its memory could not give pieces of this back, and nothing is written to a disk from here.
        munlock(base, capacity)
        // Large pages: random access would spend its time in the translation of addresses.
        madvise(base, capacity, MADV_HUGEPAGE)
        current = Mutex(record)
        self.capacity = capacity
        self.base = base
        written = marks.bindMemory(to: Bool.self, capacity: (capacity + Self.grain - 1) / Self.grain)
    }

    private static func map(_ length: UInt64) -> (base: UnsafeMutableRawPointer, capacity: Int)? {
        let length = Int(clamping: length)
        let address = mmap(
            nil, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let address, address != qbd_map_failed() else { return nil }
        return (address, length)
    }

    deinit {
        munmap(base, capacity)
        free(written)
    }

    /// Memory moves for nobody: replies may be sent from it.
    func grow(to wanted: UInt64?, pool: String) throws(BackendError) -> VolumeRecord {
        let record = record
        guard let size = wanted else { return record }
        try record.checkGrowth(to: size, pool: pool)
        guard size <= UInt64(capacity) else {
            throw BackendError(
                code: ENOMEM,
                message: "\(pool)/\(record.volume) cannot have \(size) bytes: there is address space for \(capacity)"
                    + " bytes of it; create a larger volume")
        }
        let grown = record.resized(to: size)
        current.withLock { $0 = grown }
        return grown
    }
}

final class MemoryOpenVolume: OpenVolume {
    private let pool: String
    let store: MemoryStore
    let readOnly: Bool
    var record: VolumeRecord { store.record }
    var protocolName: String { "memory" }

    init(pool: String, store: MemoryStore, readOnly: Bool) {
        self.pool = pool
        self.store = store
        self.readOnly = readOnly
    }

    func start(on loop: EventLoop, buffers: BufferPool, client: any BackendClient) -> any Backend {
        MemoryVolume(store, readOnly: readOnly, buffers: buffers, client: client)
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord { try store.grow(to: size, pool: pool) }

    func close() { store.users.store(0, ordering: .relaxed) }
}
