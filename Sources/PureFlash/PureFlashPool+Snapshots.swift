import Backend
import Glibc

/// A conductor makes snapshots and opens them. It has no operation for anything else that one does with them.
extension PureFlashPool: SnapshotPool {
    package var openVolumesMakeSnapshots: Bool { false }

    /// A store that cannot be told of a snapshot is written off.
    package func expectSnapshot(volume: String) throws(BackendError) { try requireStores(of: volume) }

    package func createSnapshot(volume: String, snapshot: String) throws(BackendError) -> SnapshotRecord {
        let found = try find(volume)
        try conductor.createSnapshot(tenant: name, volume: volume, snapshot: snapshot)
        // It is known by the volume's id and a number of its own, which only opening it tells.
        return SnapshotRecord(id: found.id, name: snapshot, size: found.size, created: Int64(time(nil)))
    }

    package func snapshots(volume: String) throws(BackendError) -> [SnapshotRecord] {
        throw missing("list the snapshots of \(name)/\(volume)", "map one by its name, pool/volume@snapshot")
    }

    package func deleteSnapshot(volume: String, snapshot: String) throws(BackendError) {
        try conductor.deleteSnapshot(tenant: name, volume: volume, snapshot: snapshot)
    }

    package func rollback(volume: String, snapshot: String) throws(BackendError) {
        throw missing(
            "return \(name)/\(volume) to a snapshot", "map \(name)/\(volume)@\(snapshot) and copy what it holds")
    }

    package func clone(volume: String, snapshot: String, to new: String) throws(BackendError) -> VolumeRecord {
        throw missing(
            "clone \(name)/\(volume)@\(snapshot)", "create \(name)/\(new), and copy what the mapped snapshot holds")
    }

    /// Nothing is left over here.
    package func tidy(stop: () -> Bool) -> TidyOutcome { TidyOutcome() }

    private func missing(_ what: String, _ instead: String) -> BackendError {
        BackendError(
            code: EOPNOTSUPP,
            message: "a PureFlash conductor has no operation to \(what); \(instead)")
    }
}
