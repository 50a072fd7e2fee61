import EventLoop
import Glibc

/// What a backend does to a stretch of a volume.
package enum Operation: UInt8, Sendable {
    case read, write, flush, trim, writeZeroes, cache, extents
}

/// One piece of a request, inside all limits of the backend's geometry. Lives in a slab of the volume.
package struct IO {
    /// For a read: where the data is, set by the backend at completion, in memory or in `pipe`. For extents: an array of
    /// `Extent`. For a write: the payload, set by the volume. First in the struct: replies chain these.
    package var segment: Segment
    package var operation: Operation
    /// Write and write-zeroes: complete only when on stable storage.
    package var durable: Bool
    /// Write-zeroes: the range may become a hole.
    package var mayPunch: Bool
    /// Write-zeroes: fail with EOPNOTSUPP where it would be as slow as writing.
    package var fast: Bool
    /// Set with `buffer`, which goes back to the pool when the reply is out.
    package var ownsBuffer: Bool
    /// Positive errno, 0 is success. Set by the backend before completion. EIO of a flush: what was acknowledged may be
    /// lost.
    package var status: Int32
    package var length: UInt32
    package var offset: UInt64
    package var buffer: Buffer?
    /// Of the client's `pipes`, where it goes back to when the reply is out.
    package var pipe: Pipe?
    /// The request this is a part of; not for the backend.
    package var request: UnsafeMutableRawPointer

    package init(operation: Operation, offset: UInt64, length: UInt32, request: UnsafeMutableRawPointer) {
        segment = Segment(base: request, count: 0)
        self.operation = operation
        durable = false
        mayPunch = true
        fast = false
        ownsBuffer = false
        status = 0
        self.length = length
        self.offset = offset
        self.request = request
    }
}

/// What a backend can do and where requests must be cut.
package struct Geometry: Sendable {
    /// Bytes, a multiple of `blockSize`.
    package var size: UInt64
    /// Smallest unit of I/O and its alignment, bytes: 512 or 4096.
    package var blockSize: UInt32
    /// Most bytes of one read or write; UInt32.max where there is no limit of its own.
    package var maximumTransfer: UInt32 = .max
    /// No I/O may cross a multiple of this many bytes; 0 for none. A power of two.
    package var boundary: UInt64 = 0
    /// As `boundary`, for reads and writes alone.
    package var transferBoundary: UInt64 = 0
    package var canTrim = true
    /// Write-zeroes without a payload is cheaper than writing zeros.
    package var canZeroFast = true
    /// Whether `extents` tells holes from data.
    package var hasExtents = true
    package var readOnly = false

    package init(size: UInt64, blockSize: UInt32) {
        self.size = size
        self.blockSize = blockSize
    }
}

/// Takes completions, on the loop's thread; may be called before `submit` returns.
package protocol BackendClient: AnyObject {
    /// The most I/O it has in flight at a time.
    var maximumInFlight: Int { get }
    /// Where data that is read may be left; nil where it has to be in memory.
    var pipes: PipePool? { get }
    func completed(_ io: UnsafeMutablePointer<IO>)
    /// What was acknowledged may be lost: every flush fails from now on, also those of later daemons. Once, before the
    /// first flush fails.
    func flushesFail()
}

extension BackendClient {
    package var pipes: PipePool? { nil }
    package func flushesFail() {}
}

/// Where the bytes of one open volume live. All calls on the volume's loop.
package protocol Backend: AnyObject {
    var geometry: Geometry { get }

    /// Starts the I/O; completes exactly once, through the client. The volume has checked bounds and alignment.
    func submit(_ io: UnsafeMutablePointer<IO>)

    /// The volume has grown to so many bytes, and I/O up to there may come.
    func resized(to size: UInt64)

    /// Where the payload of a write may be received straight away; nil where it has to be handed to `submit` from
    /// elsewhere. What arrives there counts as a write in flight from then on, whether it is submitted or not.
    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer?

    /// Some of that payload has arrived there. Called each time, before anything else is done with the volume: other I/O
    /// may have changed the same bytes since the last time, and the write may never be submitted.
    func payloadArrived(offset: UInt64, length: UInt32)

    /// For people; nil where the bytes are not with others.
    var report: ClusterReport? { get }

    /// Leaves the loop. Nothing is in flight. The volume's descriptors and locks stay with its `OpenVolume`.
    func close()
}

extension Backend {
    package func payloadArrived(offset: UInt64, length: UInt32) {}

    package var report: ClusterReport? { nil }
}

/// Who has the bytes of a volume, and how it is with the way there.
package struct ClusterReport: Sendable, Equatable {
    package struct Shard: Sendable, Equatable {
        /// Of the stores that have it, the primary's first; empty when there is none.
        package let addresses: [String]
        /// Of the store that is asked.
        package let store: String?

        package init(addresses: [String], store: String?) {
            self.addresses = addresses
            self.store = store
        }
    }

    package enum StoreState: String, Sendable {
        /// Nothing was asked of it yet.
        case unused
        case connecting
        case connected
        /// The connection is lost; it is made again when there is I/O for it.
        case lost
    }

    package struct Store: Sendable, Equatable {
        package let address: String
        package let state: StoreState
        /// Those that are up.
        package let connections: Int
        /// Without an answer.
        package let requests: Int
        /// Why a connection was lost and is not back.
        package let trouble: String?

        package init(address: String, state: StoreState, connections: Int, requests: Int, trouble: String?) {
            self.address = address
            self.state = state
            self.connections = connections
            self.requests = requests
            self.trouble = trouble
        }
    }

    /// Who is asked where the shards are.
    package let conductor: String
    /// By index.
    package let shards: [Shard]
    package let stores: [Store]
    /// Why I/O waits, in one sentence; nil when it does not.
    package let waits: String?

    package init(conductor: String, shards: [Shard], stores: [Store], waits: String?) {
        self.conductor = conductor
        self.shards = shards
        self.stores = stores
        self.waits = waits
    }
}

/// A volume opened by its pool and not yet running on a loop.
package protocol OpenVolume: AnyObject, Sendable {
    /// Changes when the volume grows.
    var record: VolumeRecord { get }
    /// "local", "memory": what `info` shows as the protocol.
    var protocolName: String { get }
    var readOnly: Bool { get }
    /// Whether trimming it is of use.
    var canTrim: Bool { get }

    /// On the loop's thread.
    /// - Parameters:
    ///   - buffers: where data that is read is put; given back by the volume.
    ///   - client: outlives the backend.
    func start(on loop: EventLoop, buffers: BufferPool, client: any BackendClient) throws(BackendError) -> any Backend

    /// Grows the volume where it lives. Its backend learns of it from the volume. On the blocking-work thread.
    /// - Parameter size: bytes; nil takes over the size it has there, which may be the one that is known.
    /// - Returns: the new record, which `record` gives from now on.
    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord

    /// Every flush is to fail, as it did for the daemon that had the volume before. Before `start`.
    func failFlushes()

    /// What is to be done for it now that snapshots were deleted; nil for nothing. On the blocking-work thread.
    func dueChange() throws(BackendError) -> StoreChange?

    /// Writes down what is not, so that what comes next, with I/O held back, has little to wait for.
    func settle() throws(BackendError)

    /// Takes what a change of the store needs, and makes what can be made before I/O is held back for it. On a thread
    /// that may wait.
    /// - Parameter giveUp: asked while somebody else is waited for: an error ends that, and is thrown.
    func prepare(_ change: StoreChange, giveUp: () -> BackendError?) throws(BackendError) -> any PreparedChange

    /// A change that was prepared has been given up: it does nothing more to this volume, whose backend is about to be
    /// started again. On the loop.
    func changeGivenUp()

    /// Gives descriptors and locks back, after the backend was closed or was never started. On the blocking-work thread.
    func close()
}

/// A store without snapshots.
extension OpenVolume {
    package func dueChange() throws(BackendError) -> StoreChange? { nil }

    package func failFlushes() {}

    package func settle() {}

    package func prepare(
        _ change: StoreChange, giveUp: () -> BackendError?
    ) throws(BackendError) -> any PreparedChange {
        throw BackendError(
            code: EOPNOTSUPP, message: "\(record.volume): a volume of type \(protocolName) has no snapshots")
    }

    package func changeGivenUp() {}
}

extension OpenVolume {
    package var canTrim: Bool { true }
}

/// A set of volumes. All calls block; they are made on the blocking-work thread.
package protocol VolumePool: AnyObject, Sendable {
    var name: String { get }

    /// - Parameters:
    ///   - size: bytes, a multiple of `blockSize`, at least one block.
    ///   - blockSize: 512 or 4096.
    func create(volume: String, size: UInt64, blockSize: UInt32) throws(BackendError) -> VolumeRecord
    /// The same, of a pool that can keep several copies.
    /// - Parameter replicas: copies of its data, at least 1; nil leaves that to the pool.
    func create(volume: String, size: UInt64, blockSize: UInt32, replicas: Int?) throws(BackendError) -> VolumeRecord
    /// Fails with EBUSY while the volume, or a snapshot of it, is open anywhere.
    /// - Parameters:
    ///   - snapshots: delete its snapshots too; EBUSY when it has some and this is false.
    ///   - force: also what is damaged and may still have good data; EIO when it is and this is false.
    func delete(volume: String, snapshots: Bool, force: Bool) throws(BackendError)
    /// Those that can be read, sorted by name.
    func list() throws(BackendError) -> [VolumeRecord]
    /// Those that cannot, and why; sorted by name.
    func damaged() throws(BackendError) -> [DamagedVolume]
    /// Nil where that is not known.
    func space() throws(BackendError) -> PoolSpace?
    /// Grows a volume that is not open, as `OpenVolume.grow`; EBUSY when it is open.
    func grow(volume: String, to size: UInt64?) throws(BackendError) -> VolumeRecord
    /// Opens for one user; a second open that could write fails with EBUSY.
    /// - Parameter volume: `volume`, or `volume@snapshot`, which can only be read.
    func open(volume: String, readOnly: Bool) throws(BackendError) -> any OpenVolume
    /// The same, of a pool that may have to wait for others.
    /// - Parameter limit: nanoseconds after which it fails; nil leaves that to the pool.
    func open(volume: String, readOnly: Bool, within limit: UInt64?) throws(BackendError) -> any OpenVolume
}

extension VolumePool {
    package func create(
        volume: String, size: UInt64, blockSize: UInt32, replicas: Int?
    ) throws(BackendError) -> VolumeRecord {
        guard replicas ?? 1 == 1 else {
            throw BackendError(
                code: EINVAL,
                message: "replicas \(replicas ?? 1): pool \(name) keeps one copy of a volume; a cluster can keep more")
        }
        return try create(volume: volume, size: size, blockSize: blockSize)
    }

    package func open(volume: String, readOnly: Bool, within limit: UInt64?) throws(BackendError) -> any OpenVolume {
        try open(volume: volume, readOnly: readOnly)
    }

    package func delete(volume: String, snapshots: Bool) throws(BackendError) {
        try delete(volume: volume, snapshots: snapshots, force: false)
    }

    package func damaged() throws(BackendError) -> [DamagedVolume] { [] }

    package func space() throws(BackendError) -> PoolSpace? { nil }
}

/// A volume of a pool that cannot be read. It can be deleted, and hinders no other.
package struct DamagedVolume: Sendable, Equatable {
    package let volume: String
    package let reason: String

    package init(volume: String, reason: String) {
        self.volume = volume
        self.reason = reason
    }
}

/// Where the bytes of a pool lie: how much of that there is, in bytes.
package struct PoolSpace: Sendable, Equatable {
    package let total: UInt64
    /// For this process.
    package let free: UInt64

    package init(total: UInt64, free: UInt64) {
        self.total = total
        self.free = free
    }

    /// Writes will fail before long: less than a twentieth is free, or less than 1 GiB of what is larger than 8.
    package var isNearlyFull: Bool { free < total / 20 || (free < 1 << 30 && total > 8 << 30) }
}

/// A pool whose volumes have snapshots. All calls block.
package protocol SnapshotPool: VolumePool {
    /// An open volume makes its snapshots itself, with `OpenVolume.prepare`; otherwise `createSnapshot` makes them of open
    /// volumes as well.
    var openVolumesMakeSnapshots: Bool { get }
    /// Of a volume that is not open, unless open ones leave it to the pool.
    /// Looks whether a snapshot can be made now, before I/O is held back for it. Nothing is done yet.
    func expectSnapshot(volume: String) throws(BackendError)
    func createSnapshot(volume: String, snapshot: String) throws(BackendError) -> SnapshotRecord
    /// Oldest first.
    func snapshots(volume: String) throws(BackendError) -> [SnapshotRecord]
    /// Space comes back with `tidy`. EBUSY while the snapshot is open.
    func deleteSnapshot(volume: String, snapshot: String) throws(BackendError)
    /// Gives the volume the contents and the size it had; EBUSY while it is open. Its snapshots stay, newer ones too.
    func rollback(volume: String, snapshot: String) throws(BackendError)
    /// Makes a volume that begins with the contents of a snapshot, and shares what neither changes.
    func clone(volume: String, snapshot: String, to new: String) throws(BackendError) -> VolumeRecord
    /// Merges the files of deleted snapshots into what was made on top of them. Takes as long as copying takes; other
    /// calls go on meanwhile. What belongs to open volumes is left to `OpenVolume.prepare`.
    /// - Parameter stop: asked now and then; true ends it early, to be called again.
    func tidy(stop: () -> Bool) throws(BackendError) -> TidyOutcome
}

extension SnapshotPool {
    package var openVolumesMakeSnapshots: Bool { true }
    package func expectSnapshot(volume: String) throws(BackendError) {}
}

/// What `SnapshotPool.tidy` came to.
package struct TidyOutcome: Sendable, Equatable {
    /// Something was changed; more may be possible now.
    package var changed = false
    /// Something is left that only time helps: it is in use, or waits to be removed.
    package var isLeft = false

    package init(changed: Bool = false, isLeft: Bool = false) {
        self.changed = changed
        self.isLeft = isLeft
    }
}

/// What a pool knows of a snapshot.
package struct SnapshotRecord: Sendable, Equatable {
    /// A multiple of 2^24, unique in its pool among volumes and snapshots.
    package let id: UInt64
    package let name: String
    /// Bytes.
    package let size: UInt64
    /// Seconds since 1970, UTC.
    package let created: Int64

    package init(id: UInt64, name: String, size: UInt64, created: Int64) {
        self.id = id
        self.name = name
        self.size = size
        self.created = created
    }
}

/// What a pool knows of a volume without opening it.
package struct VolumeRecord: Sendable, Equatable {
    /// A multiple of 2^24, unique in its pool (PureFlash's form of volume ids).
    package let id: UInt64
    package let volume: String
    /// Bytes.
    package let size: UInt64
    /// Bytes.
    package let blockSize: UInt32
    /// Seconds since 1970, UTC; nil when its store does not say.
    package let created: Int64?

    package init(id: UInt64, volume: String, size: UInt64, blockSize: UInt32, created: Int64?) {
        self.id = id
        self.volume = volume
        self.size = size
        self.blockSize = blockSize
        self.created = created
    }

    /// The same volume of another size.
    package func resized(to size: UInt64) -> VolumeRecord {
        VolumeRecord(id: id, volume: volume, size: size, blockSize: blockSize, created: created)
    }

    /// EINVAL unless the size is one the volume can grow to.
    /// - Parameter pool: for the error's text.
    package func checkGrowth(to size: UInt64, pool: String) throws(BackendError) {
        guard size > self.size else {
            throw BackendError(
                code: EINVAL,
                message: "\(pool)/\(volume) has \(self.size) bytes, and \(size) bytes are "
                    + (size == self.size ? "the same" : "less") + ": a volume can only grow")
        }
        guard size % UInt64(blockSize) == 0, size <= UInt64(Int64.max) else {
            throw BackendError(
                code: EINVAL,
                message: "\(pool)/\(volume) cannot have \(size) bytes: the size must be a multiple of its block size, "
                    + "\(blockSize) bytes")
        }
    }
}

/// Why a pool could not do it: an errno for scripts, a sentence for people.
package struct BackendError: Error, Sendable, CustomStringConvertible {
    /// Positive errno.
    package let code: Int32
    package let message: String

    package init(code: Int32, message: String) {
        self.code = code
        self.message = message
    }

    package init(_ error: SystemError) {
        self.init(code: error.code, message: error.description)
    }

    package var description: String { message }
}
