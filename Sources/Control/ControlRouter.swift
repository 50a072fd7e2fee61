import Glibc
import NIOCore
import NIOHTTP1

/// From a command and the bytes of its question to the bytes of its answer.
struct ControlRouter: Sendable {
    /// An HTTP answer; its body is JSON.
    struct Reply: Sendable {
        var status: HTTPResponseStatus
        var body: String
        var extraHeaders: [(String, String)] = []
    }

    let service: any ControlService

    /// Calls the service and waits for it.
    func reply(to command: Command, body: ByteBuffer, for caller: ControlCaller) async -> Reply {
        do {
            return Reply(status: .ok, body: try await answer(command, body, service.asked(by: caller)))
        } catch {
            return Self.failure(error, command)
        }
    }

    /// The answer that carries an error.
    static func failure(
        _ error: ControlError, _ command: Command?, status: HTTPResponseStatus? = nil,
        extraHeaders: [(String, String)] = []
    ) -> Reply {
        let document = ErrorDocument(
            error: .init(code: error.code, message: error.message, command: command?.ioctlName))
        // A document of two strings and a number always encodes; should it not, the status still says it.
        let body = (try? ControlJSON.compact(document)) ?? "{}"
        return Reply(status: status ?? Self.status(of: error.code), body: body, extraHeaders: extraHeaders)
    }

    private func answer(
        _ command: Command, _ body: ByteBuffer, _ service: any ControlService
    ) async throws(ControlError) -> String {
        switch command {
        case .map: try await answer(body) { r throws(ControlError) in try await service.map(r) }
        case .unmap: try await answer(body) { r throws(ControlError) in try await service.unmap(r) }
        case .remap: try await answer(body) { r throws(ControlError) in try await service.remap(r) }
        case .list: try await answer(body) { r throws(ControlError) in try await service.list(r) }
        case .setThrottle: try await answer(body) { r throws(ControlError) in try await service.setThrottle(r) }
        case .suspend: try await answer(body) { r throws(ControlError) in try await service.suspend(r) }
        case .resume: try await answer(body) { r throws(ControlError) in try await service.resume(r) }
        case .info: try await answer(body) { r throws(ControlError) in try await service.info(r) }
        case .resize: try await answer(body) { r throws(ControlError) in try await service.resize(r) }
        case .version: try await answer(body) { r throws(ControlError) in try await service.version(r) }
        case .create: try await answer(body) { r throws(ControlError) in try await service.create(r) }
        case .delete: try await answer(body) { r throws(ControlError) in try await service.delete(r) }
        case .volumes: try await answer(body) { r throws(ControlError) in try await service.volumes(r) }
        case .createSnapshot: try await answer(body) { r throws(ControlError) in try await service.createSnapshot(r) }
        case .deleteSnapshot: try await answer(body) { r throws(ControlError) in try await service.deleteSnapshot(r) }
        case .rollback: try await answer(body) { r throws(ControlError) in try await service.rollback(r) }
        case .snapshots: try await answer(body) { r throws(ControlError) in try await service.snapshots(r) }
        case .clone: try await answer(body) { r throws(ControlError) in try await service.clone(r) }
        }
    }

    private func answer<Request: ControlRequest>(
        _ body: ByteBuffer, _ serve: (Request) async throws(ControlError) -> Request.Answer
    ) async throws(ControlError) -> String {
        let request: Request
        do {
            request = try ControlJSON.decode(Request.self, from: body)
        } catch {
            throw .invalid("the request was not understood: \(ControlJSON.reason(error))")
        }
        return try ControlJSON.compact(try await serve(request))
    }

    /// The status of HTTP nearest to an errno; clients go by the errno.
    private static func status(of code: Int32) -> HTTPResponseStatus {
        switch code {
        case EINVAL: .badRequest
        case EPERM, EACCES, EROFS: .forbidden
        case ENOENT, ENOTTY: .notFound
        case EBUSY, EEXIST: .conflict
        case EOPNOTSUPP: .notImplemented
        case ETIMEDOUT: .gatewayTimeout
        default: .internalServerError
        }
    }
}
