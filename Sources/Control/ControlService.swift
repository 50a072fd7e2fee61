/// What the daemon does for each command. Called from any task, several at a time.
package protocol ControlService: Sendable {
    /// The service as this caller may use it.
    func asked(by caller: ControlCaller) -> Self

    func map(_ request: MapRequest) async throws(ControlError) -> MapRequest.Answer
    func unmap(_ request: UnmapRequest) async throws(ControlError) -> UnmapRequest.Answer
    func remap(_ request: RemapRequest) async throws(ControlError) -> RemapRequest.Answer
    func list(_ request: ListRequest) async throws(ControlError) -> ListRequest.Answer
    func setThrottle(_ request: SetThrottleRequest) async throws(ControlError) -> SetThrottleRequest.Answer
    func suspend(_ request: SuspendRequest) async throws(ControlError) -> SuspendRequest.Answer
    func resume(_ request: ResumeRequest) async throws(ControlError) -> ResumeRequest.Answer
    func info(_ request: InfoRequest) async throws(ControlError) -> InfoRequest.Answer
    func resize(_ request: ResizeRequest) async throws(ControlError) -> ResizeRequest.Answer
    func version(_ request: VersionRequest) async throws(ControlError) -> VersionRequest.Answer
    func create(_ request: CreateRequest) async throws(ControlError) -> CreateRequest.Answer
    func delete(_ request: DeleteRequest) async throws(ControlError) -> DeleteRequest.Answer
    func volumes(_ request: VolumesRequest) async throws(ControlError) -> VolumesRequest.Answer
    func createSnapshot(_ request: CreateSnapshotRequest) async throws(ControlError) -> CreateSnapshotRequest.Answer
    func deleteSnapshot(_ request: DeleteSnapshotRequest) async throws(ControlError) -> DeleteSnapshotRequest.Answer
    func rollback(_ request: RollbackRequest) async throws(ControlError) -> RollbackRequest.Answer
    func snapshots(_ request: SnapshotsRequest) async throws(ControlError) -> SnapshotsRequest.Answer
    func clone(_ request: CloneRequest) async throws(ControlError) -> CloneRequest.Answer
}
