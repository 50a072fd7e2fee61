import Backend
import Configuration
import Control
import Volumes

extension DaemonService {
    func createSnapshot(
        _ request: CreateSnapshotRequest
    ) async throws(ControlError) -> CreateSnapshotRequest.Answer {
        try await withSnapshot(
            request.snapshot, request.config, request.defaultConfig, "make"
        ) { (pool, name, snapshot) throws(BackendError) in
            PoolSnapshot(
                try await manager.createSnapshot(pool, volume: name.volume, snapshot: snapshot), of: name)
        }
    }

    func deleteSnapshot(
        _ request: DeleteSnapshotRequest
    ) async throws(ControlError) -> DeleteSnapshotRequest.Answer {
        try await withSnapshot(
            request.snapshot, request.config, request.defaultConfig, "delete"
        ) { (pool, name, snapshot) throws(BackendError) in
            try await manager.deleteSnapshot(pool, volume: name.volume, snapshot: snapshot)
            return Done()
        }
    }

    func rollback(_ request: RollbackRequest) async throws(ControlError) -> RollbackRequest.Answer {
        try await withSnapshot(
            request.snapshot, request.config, request.defaultConfig, "roll back to"
        ) { (pool, name, snapshot) throws(BackendError) in
            try await manager.rollback(pool, volume: name.volume, snapshot: snapshot)
            return Done()
        }
    }

    func snapshots(_ request: SnapshotsRequest) async throws(ControlError) -> SnapshotsRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        let pool = try await pool(of: name, request.config, request.defaultConfig)
        do throws(BackendError) {
            return .init(
                snapshots: try await manager.snapshots(pool, volume: name.volume).map { PoolSnapshot($0, of: name) })
        } catch {
            throw ControlError(error)
        }
    }

    func clone(_ request: CloneRequest) async throws(ControlError) -> CloneRequest.Answer {
        let new = try VolumeName.reachable(request.volume)
        return try await withSnapshot(
            request.snapshot, nil, request.config, "clone"
        ) { (pool, name, snapshot) throws(BackendError) in
            guard new.pool == name.pool else {
                throw BackendError(code: 22, message: "\(new) is not of \(name)'s pool, and a clone shares its data")
            }
            return PoolVolume(
                try await manager.clone(pool, volume: name.volume, snapshot: snapshot, to: new.volume),
                inPool: name.pool)
        }
    }

    private func withSnapshot<Answer: Sendable>(
        _ text: String, _ config: String?, _ defaultConfig: String?, _ what: String,
        _ body: (any VolumePool, VolumeName, String) async throws(BackendError) -> Answer
    ) async throws(ControlError) -> Answer {
        let name = try VolumeName.reachable(text, snapshot: .required)
        let pool = try await pool(of: name, config, defaultConfig)
        do throws(BackendError) { return try await body(pool, name, name.snapshot ?? "") } catch {
            throw failed(what, name, error)
        }
    }

    /// The pool of the configuration that was named; else of the one the volume is mapped with; else of the default one.
    private func pool(
        of name: VolumeName, _ config: String?, _ defaultConfig: String?
    ) async throws(ControlError) -> any VolumePool {
        let mapped = manager.configPath(pool: name.pool, volume: name.volume)
        guard let path = config ?? mapped ?? defaultConfig else {
            throw .invalid("\(name.pool)/\(name.volume) is not mapped; name the configuration of its pool")
        }
        return try await pools.pool(name.pool, try ConfigPath.validate(path), transport: name.transport, for: caller)
    }
}

extension PoolSnapshot {
    init(_ record: SnapshotRecord, of volume: VolumeName) {
        self.init(
            snapshot: "\(volume.pool)/\(volume.volume)@\(record.name)", id: record.id, size: record.size,
            created: record.created)
    }
}
