import Control
import Synchronization

/// A service that answers what it was told to, and can be made to wait.
final class FakeService: ControlService {
    private struct State {
        var mappings: [MappingRecord] = []
        var requests: [String] = []
        var callers: [ControlCaller] = []
        var waiters: [CheckedContinuation<Void, Never>] = []
        var arrivals: [CheckedContinuation<Void, Never>] = []
        var blocked = 0
    }

    private let state = Mutex(State())

    func asked(by caller: ControlCaller) -> FakeService {
        state.withLock { $0.callers.append(caller) }
        return self
    }

    /// Who asked, in the order it came.
    var callers: [ControlCaller] { state.withLock { $0.callers } }

    /// What was asked, in the order it came.
    var requests: [String] { state.withLock { $0.requests } }

    func setMappings(_ mappings: [MappingRecord]) { state.withLock { $0.mappings = mappings } }

    func map(_ request: MapRequest) async throws(ControlError) -> MapRequest.Answer {
        note("map \(request.volume) \(request.config) \(request.readOnly) \(request.export)")
        var record = MappingRecord.example
        record.volume = request.volume
        record.config = request.config
        record.readOnly = request.readOnly
        return record
    }

    func unmap(_ request: UnmapRequest) async throws(ControlError) -> UnmapRequest.Answer {
        note("unmap \(request.volume) \(request.config ?? "-") \(request.force)")
        throw .notMapped("\(request.volume) is not mapped")
    }

    func remap(_ request: RemapRequest) async throws(ControlError) -> RemapRequest.Answer {
        note("remap \(request.volume) \(request.config ?? "-")")
        return Done()
    }

    func setThrottle(_ request: SetThrottleRequest) async throws(ControlError) -> SetThrottleRequest.Answer {
        note("throttle \(request.volume) \(request.limits.readBytes ?? 0)")
        return .none
    }

    func suspend(_ request: SuspendRequest) async throws(ControlError) -> SuspendRequest.Answer {
        note("suspend \(request.volume) \(request.timeout ?? 0)")
        return Done()
    }

    func resume(_ request: ResumeRequest) async throws(ControlError) -> ResumeRequest.Answer {
        note("resume \(request.volume) \(request.mode)")
        return .init()
    }

    func list(_ request: ListRequest) async throws(ControlError) -> ListRequest.Answer {
        .init(mappings: state.withLock { $0.mappings })
    }

    /// Waits until `release`.
    func info(_ request: InfoRequest) async throws(ControlError) -> InfoRequest.Answer {
        await withCheckedContinuation { continuation in
            state.withLock { state in
                state.waiters.append(continuation)
                state.blocked += 1
                for arrival in state.arrivals { arrival.resume() }
                state.arrivals = []
            }
        }
        let none = MappingStatus.Percentiles(count: 3, p50: 0.5, p90: 1, p99: 2, p999: 3, max: 4)
        return MappingStatus(
            mapping: .example,
            counters: .init(
                reads: 1, writes: 2, flushes: 3, trims: 4, readBytes: 5, writtenBytes: .max, errors: 7, slow: 9,
                inFlight: 8),
            heldBack: .init(requests: 9, oldest: 10, by: "throttle"),
            latency: .init(reads: none, writes: none, flushes: none))
    }

    func version(_ request: VersionRequest) async throws(ControlError) -> VersionRequest.Answer {
        .init(version: ProductVersion.string, pid: 1)
    }

    func create(_ request: CreateRequest) async throws(ControlError) -> CreateRequest.Answer {
        note("create \(request.volume) \(request.config) \(request.size) \(request.blockSize)")
        return PoolVolume(
            volume: request.volume, id: 1 << 24, size: request.size, blockSize: request.blockSize, created: 1)
    }

    func delete(_ request: DeleteRequest) async throws(ControlError) -> DeleteRequest.Answer {
        note("delete \(request.volume) \(request.config)")
        throw ControlError(16, "\(request.volume) is mapped")
    }

    func resize(_ request: ResizeRequest) async throws(ControlError) -> ResizeRequest.Answer {
        note("resize \(request.volume) \(request.size ?? 0)")
        return PoolVolume(volume: request.volume, id: 1 << 24, size: request.size ?? 512, blockSize: 512, created: 1)
    }

    func createSnapshot(_ request: CreateSnapshotRequest) async throws(ControlError) -> CreateSnapshotRequest.Answer {
        note("createSnapshot \(request.snapshot)")
        return PoolSnapshot(snapshot: request.snapshot, id: 1 << 24, size: 512, created: 1)
    }

    func deleteSnapshot(_ request: DeleteSnapshotRequest) async throws(ControlError) -> DeleteSnapshotRequest.Answer {
        note("deleteSnapshot \(request.snapshot)")
        return Done()
    }

    func rollback(_ request: RollbackRequest) async throws(ControlError) -> RollbackRequest.Answer {
        note("rollback \(request.snapshot)")
        return Done()
    }

    func snapshots(_ request: SnapshotsRequest) async throws(ControlError) -> SnapshotsRequest.Answer {
        note("snapshots \(request.volume)")
        return .init(snapshots: [])
    }

    func clone(_ request: CloneRequest) async throws(ControlError) -> CloneRequest.Answer {
        note("clone \(request.snapshot) \(request.volume)")
        return PoolVolume(volume: request.volume, id: 1 << 24, size: 512, blockSize: 512, created: 1)
    }

    func volumes(_ request: VolumesRequest) async throws(ControlError) -> VolumesRequest.Answer {
        note("volumes \(request.pool ?? "*") \(request.config)")
        return .init(
            volumes: [], problems: [.init(pool: "gone", error: ControlError(2, "no folder"))])
    }

    private func note(_ text: String) { state.withLock { $0.requests.append(text) } }

    /// Returns when `info` has been called.
    func untilBlocked() async {
        await withCheckedContinuation { continuation in
            state.withLock { state in
                if state.blocked > 0 { continuation.resume() } else { state.arrivals.append(continuation) }
            }
        }
    }

    func release() {
        let waiters = state.withLock { state in
            defer { state.waiters = [] }
            return state.waiters
        }
        for waiter in waiters { waiter.resume() }
    }
}

/// A server with a fake service in a folder of its own, and what it reported.
struct Fixture: Sendable {
    let folder: TemporaryFolder
    let service = FakeService()
    let server: ControlServer
    let reports: Reports

    final class Reports: Sendable {
        private let lines = Mutex<[String]>([])
        var all: [String] { lines.withLock { $0 } }
        func add(_ line: String) { lines.withLock { $0.append(line) } }
    }

    var client: ControlClient { ControlClient(path: folder.socket, timeout: .seconds(20)) }

    /// Runs a test against it, and stops it.
    static func with(
        _ limits: ControlServer.Limits = .init(), _ test: (Fixture) async throws -> Void
    ) async throws {
        let fixture = try await Fixture(limits)
        do {
            try await test(fixture)
        } catch {
            fixture.service.release()
            await fixture.server.stop()
            throw error
        }
        fixture.service.release()
        await fixture.server.stop()
    }

    private init(_ limits: ControlServer.Limits) async throws {
        let folder = try TemporaryFolder()
        let reports = Reports()
        self.folder = folder
        self.reports = reports
        server = try await ControlServer(
            at: ControlPath.reserve(folder.socket), service: service, limits: limits, report: { reports.add($0) })
    }
}
