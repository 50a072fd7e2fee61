import Backend
import Glibc
import NIOCore
import NIOHTTP1
import NIOPosix

/// Asks a cluster's conductor: HTTP GET with answers in JSON. From any thread but a volume's loop, which may only start
/// a request.
package final class ConductorClient: Sendable {
    /// Where the conductors are.
    package enum Source: Sendable {
        /// In the order to try them; at least one.
        case endpoints([HTTPEndpoint])
        case zooKeeper(ConductorDiscovery)

        /// For an error's text.
        fileprivate var remedy: String {
            switch self {
            case .endpoints: "look whether it runs, and at [conductor] endpoints"
            case .zooKeeper(let discovery): discovery.remedy
            }
        }
    }

    /// The port a conductor's HTTP server listens on.
    package static let defaultPort = 49180

    private let source: Source
    /// Of one try.
    private let timeout: TimeAmount
    /// For what may have to wait for a disk: nobody knows what became of it when it is given up.
    private static let changeTimeout = TimeAmount.seconds(60)
    /// Never shut down: it lives as long as the process.
    private static let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
    /// On which everything of it is done.
    static var loop: any NIOCore.EventLoop { group.any() }

    /// - Parameters:
    ///   - timeout: nanoseconds that one conductor has for one answer, and ZooKeeper for one question.
    package init(_ source: Source, timeout: Int64) {
        self.source = source
        self.timeout = .nanoseconds(timeout)
    }

    /// Who is asked, as far as that is known; for people.
    var name: String {
        switch source {
        case .endpoints(let endpoints): endpoints.map(\.description).joined(separator: ",")
        case .zooKeeper(let discovery): discovery.last?.description ?? "-"
        }
    }

    // MARK: Operations

    /// Opens a volume and calls back, on a thread of its own; tries each conductor once.
    /// - Parameters:
    ///   - snapshot: empty for the volume itself.
    ///   - limit: nanoseconds for all tries together; nil leaves it at the time of each.
    func open(
        tenant: String, volume: String, snapshot: String, within limit: UInt64?,
        completion: @escaping @Sendable (Result<VolumeLayout, BackendError>) -> Void
    ) {
        ask(
            "open_volume", [("volume_name", volume), ("snapshot_name", snapshot), ("tenant_name", tenant)],
            within: limit, of: OpenVolumeAnswer.self
        ).whenComplete { result in
            completion(
                Self.outcome(result).flatMap { answer in
                    do throws(BackendError) { return .success(try answer.layout()) } catch { return .failure(error) }
                })
        }
    }

    func create(tenant: String, volume: String, size: UInt64, replicas: Int) throws(BackendError) -> CreateVolumeAnswer
    {
        try wait(
            ask(
                "create_volume",
                [("volume_name", volume), ("size", "\(size)"), ("rep_cnt", "\(replicas)"), ("tenant_name", tenant)],
                isChange: true, of: CreateVolumeAnswer.self))
    }

    func delete(tenant: String, volume: String) throws(BackendError) {
        _ = try wait(
            ask(
                "delete_volume", [("volume_name", volume), ("tenant_name", tenant)], isChange: true,
                of: ConductorStatus.self))
    }

    func list(tenant: String) throws(BackendError) -> [ListVolumeAnswer.Volume] {
        try wait(ask("list_volume", [("tenant_name", tenant), ("limit", "100000")], of: ListVolumeAnswer.self)).volumes
    }

    /// The addresses of the stores that it believes alive.
    func aliveStores(within limit: UInt64?) -> EventLoopFuture<Set<String>> {
        ask("list_store", [], within: limit, of: ListStoreAnswer.self).map(\.alive)
    }

    /// The names of the cluster's tenants. From any task.
    package func tenants() async throws(BackendError) -> [String] {
        let result: Result<ListTenantAnswer, any Error>
        do { result = .success(try await ask("list_tenant", [], of: ListTenantAnswer.self).get()) } catch {
            result = .failure(error)
        }
        return try Self.outcome(result).get().tenants.map(\.name)
    }

    func createSnapshot(tenant: String, volume: String, snapshot: String) throws(BackendError) {
        try changeSnapshot("create_snapshot", tenant, volume, snapshot)
    }

    func deleteSnapshot(tenant: String, volume: String, snapshot: String) throws(BackendError) {
        try changeSnapshot("delete_snapshot", tenant, volume, snapshot)
    }

    private func changeSnapshot(
        _ operation: String, _ tenant: String, _ volume: String, _ snapshot: String
    ) throws(BackendError) {
        let names = [("tenant_name", tenant), ("volume_name", volume), ("snapshot_name", snapshot)]
        _ = try wait(ask(operation, names, isChange: true, of: ConductorStatus.self))
    }

    /// - Parameter size: bytes, a multiple of a MiB, the unit of this one request.
    func resize(tenant: String, volume: String, size: UInt64) throws(BackendError) {
        _ = try wait(
            ask(
                "update_volume", [("tenant_name", tenant), ("volume_name", volume), ("size", "\(size >> 20)")],
                isChange: true, of: ConductorStatus.self))
    }

    // MARK: Asking

    /// Not on a thread of the client.
    func wait<Answer: Sendable>(_ future: EventLoopFuture<Answer>) throws(BackendError) -> Answer {
        let result: Result<Answer, any Error>
        do { result = .success(try future.wait()) } catch { result = .failure(error) }
        return try Self.outcome(result).get()
    }

    static func outcome<Answer>(_ result: Result<Answer, any Error>) -> Result<Answer, BackendError> {
        result.mapError { error in
            error as? BackendError ?? BackendError(code: EIO, message: "the conductor could not be asked: \(error)")
        }
    }

    private func ask<Answer: Decodable & Sendable>(
        _ operation: String, _ parameters: [(String, String)], within limit: UInt64? = nil, isChange: Bool = false,
        of: Answer.Type
    ) -> EventLoopFuture<Answer> {
        let query = ([("op", operation)] + parameters).map { "\($0)=\(Self.escaped($1))" }.joined(separator: "&")
        let loop = Self.loop
        let deadline = limit.map { .now() + .nanoseconds(Int64(clamping: $0)) } ?? NIODeadline.distantFuture
        return conductors(on: loop, until: deadline).flatMap { [self] conductors in
            get("/s5c/?\(query)", from: conductors[...], until: deadline, isChange: isChange, on: loop)
        }.flatMapThrowing { body in
            try ConductorStatus.decode(Answer.self, operation, body)
        }
    }

    /// For one try.
    private func patience(_ deadline: NIODeadline) -> TimeAmount {
        max(min(timeout, deadline - .now()), .nanoseconds(0))
    }

    private func conductors(
        on loop: any NIOCore.EventLoop, until deadline: NIODeadline
    ) -> EventLoopFuture<[HTTPEndpoint]> {
        switch source {
        case .endpoints(let endpoints): return loop.makeSucceededFuture(endpoints)
        case .zooKeeper(let discovery):
            let promise = loop.makePromise(of: HTTPEndpoint.self)
            let patience = patience(deadline)
            let timer = loop.scheduleTask(in: patience) {
                if let last = discovery.last { return promise.succeed(last) }
                promise.fail(
                    BackendError(
                        code: ETIMEDOUT,
                        message: "\(discovery.name) did not answer within \(patience.nanoseconds / 1_000_000) ms;"
                            + " look whether it runs, and at [zookeeper] ip"))
            }
            discovery.leader { promise.completeWith($0.mapError { $0 as any Error }) }
            promise.futureResult.whenComplete { _ in timer.cancel() }
            return promise.futureResult.map { [$0] }
        }
    }

    /// - Parameter isChange: once it was sent, no other conductor is asked: it may have been done, or still be.
    private func get(
        _ uri: String, from endpoints: ArraySlice<HTTPEndpoint>, until deadline: NIODeadline, isChange: Bool,
        on loop: any NIOCore.EventLoop
    ) -> EventLoopFuture<[UInt8]> {
        guard let endpoint = endpoints.first else {
            return loop.makeFailedFuture(BackendError(code: EHOSTUNREACH, message: "no conductor is configured"))
        }
        let isSent = NIOLoopBoundBox(false, eventLoop: loop)
        return get(uri, from: endpoint, within: patience(deadline), isChange ? isSent : nil, on: loop)
            .flatMapError { [self] error in
                if isChange, isSent.value, let error = error as? BackendError {
                    let text = "\(error.message); it may have done what it was asked, or still do it"
                    return loop.makeFailedFuture(BackendError(code: error.code, message: text))
                }
                guard endpoints.count > 1, deadline > .now() else { return loop.makeFailedFuture(error) }
                return get(uri, from: endpoints.dropFirst(), until: deadline, isChange: isChange, on: loop)
            }
    }

    /// - Parameter isSent: set for a change when the conductor is reached, which then has the time of one.
    private func get(
        _ uri: String, from endpoint: HTTPEndpoint, within timeout: TimeAmount, _ isSent: NIOLoopBoundBox<Bool>?,
        on loop: any NIOCore.EventLoop
    ) -> EventLoopFuture<[UInt8]> {
        let promise = loop.makePromise(of: HTTPExchange.Answer.self)
        let fail: @Sendable (TimeAmount) -> Void = { time in
            promise.fail(
                BackendError(
                    code: ETIMEDOUT,
                    message: "the conductor \(endpoint) did not answer within \(time.nanoseconds / 1_000_000) ms"))
        }
        let limit = max(timeout, Self.changeTimeout)
        let last = isSent.map { _ in loop.scheduleTask(in: limit) { fail(limit) } }
        let deadline = loop.scheduleTask(in: timeout) {
            if isSent?.value != true { fail(timeout) }
        }
        let remedy = source.remedy
        HTTPExchange.get(
            uri, from: endpoint, peer: "the conductor \(endpoint)", timeout: timeout, promise: promise, on: loop,
            connected: { isSent?.value = true }
        ) { Self.unreachable(endpoint, $0, remedy) }
        promise.futureResult.whenComplete { _ in
            deadline.cancel()
            last?.cancel()
        }
        return promise.futureResult.flatMapThrowing { answer in
            guard answer.status == .ok else {
                throw BackendError(
                    code: answer.status.code >= 500 ? EAGAIN : EREMOTEIO,
                    message: "the conductor \(endpoint) answered with HTTP status \(answer.status.code)")
            }
            return answer.body
        }
    }

    private static func unreachable(
        _ endpoint: HTTPEndpoint, _ error: any Error, _ remedy: String
    ) -> BackendError {
        let code: Int32
        let reason: String
        switch error {
        case let error as IOError: (code, reason) = (error.errnoCode, String(cString: strerror(error.errnoCode)))
        case let error as NIOConnectionError:
            if let unknown = (error.dnsAError ?? error.dnsAAAAError) as? SocketAddressError.UnknownHost {
                (code, reason) = (EHOSTUNREACH, unknown.errorDescription)
            } else {
                let first = error.connectionErrors.first?.error as? IOError
                code = first?.errnoCode ?? EHOSTUNREACH
                reason = String(cString: strerror(code))
            }
        case is ChannelError: (code, reason) = (ETIMEDOUT, "no connection in time")
        default: (code, reason) = (EHOSTUNREACH, "\(error)")
        }
        return BackendError(
            code: code, message: "the conductor \(endpoint) cannot be reached: \(reason); \(remedy)")
    }

    private static func escaped(_ text: String) -> String {
        // Names hold nothing that needs it; what does not is written as it is.
        text.utf8.map { byte in
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."), UInt8(ascii: "_"):
                return String(UnicodeScalar(byte))
            default:
                let digits = String(byte, radix: 16, uppercase: true)
                return "%" + (digits.count == 1 ? "0" + digits : digits)
            }
        }.joined()
    }
}
