import Glibc
import NIOCore
import NIOHTTP1
import NIOPosix

/// The command's side of the control socket: one connection for each question.
package struct ControlClient: Sendable {
    /// The daemon's socket when neither an option nor the environment says otherwise.
    package static let defaultSocketPath = "/run/qbd/qbdctl.sock"

    package let path: String
    /// How long one question may take, from connecting to the last byte of its answer.
    package let timeout: Duration

    /// Longer than the default `open_volume_timeout` of 180 s, within which mapping may still succeed.
    package static let defaultTimeout = Duration.seconds(200)

    package init(path: String, timeout: Duration = defaultTimeout) {
        self.path = path
        self.timeout = timeout
    }

    /// Asks the daemon and waits for its answer.
    ///
    /// - Throws: what the daemon answered; or, when there was no answer of a daemon: code 111 when it is not running, 1
    ///   without permission to ask, 110 when it took too long, 71 when something else than qbdd answers, 104 when it
    ///   closed before it answered, 95 for a command that comes in a later version.
    package func send<Request: ControlRequest>(_ request: Request) async throws(ControlError) -> Request.Answer {
        let body = try ControlJSON.compact(request)
        let response = try await exchange(Request.command, body)
        guard response.head.headers.first(name: "server")?.hasPrefix("qbdd/") ?? false else { throw wrongSocket }
        guard response.head.status == .ok else {
            throw (try? ControlJSON.decode(ErrorDocument.self, from: response.body)).map {
                ControlError($0.error.code, $0.error.message)
            } ?? wrongSocket
        }
        do {
            return try ControlJSON.decode(Request.Answer.self, from: response.body)
        } catch {
            throw ControlError(
                EPROTO,
                "the answer of \(response.head.headers.first(name: "server") ?? "qbdd") was not understood:"
                    + " \(ControlJSON.reason(error)); qbd is \(ProductVersion.string), update the older of the two")
        }
    }

    /// Never shut down: it lives as long as the process.
    private static let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)

    private func exchange(_ command: Command, _ body: String) async throws(ControlError) -> Exchange.Response {
        _ = try UnixAddress(path)
        let promise = Self.group.any().makePromise(of: Exchange.Response.self)
        let deadline = NIODeadline.now() + TimeAmount(timeout)
        Self.connect(path, until: deadline) { channel in
            channel.eventLoop.makeCompletedFuture {
                try channel.pipeline.syncOperations.addHTTPClientHandlers()
                try channel.pipeline.syncOperations.addHandler(
                    Exchange(command: command, body: body, deadline: deadline, promise: promise))
            }
        }.whenFailure { promise.fail($0) }
        do {
            return try await promise.futureResult.get()
        } catch let fault as Exchange.Fault {
            throw describe(fault)
        } catch let error as IOError {
            throw describe(error)
        } catch is HTTPParserError {
            throw wrongSocket
        } catch {
            throw ControlError(EIO, "cannot ask qbdd at \(path): \(error)")
        }
    }

    /// A Unix socket whose queue is full refuses at once instead of letting one wait, so this asks again until there is
    /// room.
    private static func connect(
        _ path: String, until deadline: NIODeadline,
        _ initializer: @escaping @Sendable (any Channel) -> EventLoopFuture<Void>
    ) -> EventLoopFuture<Void> {
        let loop = group.any()
        let connected = ClientBootstrap(group: loop).channelInitializer(initializer).connect(unixDomainSocketPath: path)
        return connected.map { _ in }.flatMapError { error in
            guard let error = error as? IOError, error.errnoCode == EAGAIN, NIODeadline.now() < deadline else {
                return loop.makeFailedFuture(error)
            }
            return loop.flatScheduleTask(in: .milliseconds(20)) {
                connect(path, until: deadline, initializer)
            }.futureResult
        }
    }
}

// MARK: - Errors

extension ControlClient {
    private var wrongSocket: ControlError {
        ControlError(
            EPROTO,
            "what answers at \(path) is not qbdd: name its control socket with --socket or QBD_SOCKET")
    }

    private func describe(_ fault: Exchange.Fault) -> ControlError {
        switch fault {
        case .timedOut:
            ControlError(
                ETIMEDOUT,
                "qbdd at \(path) did not answer within \(timeout): it may still do what it was asked; look at its log")
        case .closed:
            ControlError(
                ECONNRESET,
                "\(path) was closed before an answer came: qbdd has stopped, or this is not its control socket")
        case .tooLong: wrongSocket
        }
    }

    private func describe(_ error: IOError) -> ControlError {
        switch error.errnoCode {
        case ENOENT, ENOTDIR:
            ControlError(ECONNREFUSED, "qbdd is not running (no socket at \(path)); \(Self.howToStart)")
        case ECONNREFUSED:
            FileIdentity.isSocket(path)
                ? ControlError(ECONNREFUSED, "qbdd is not running (nobody listens at \(path)); \(Self.howToStart)")
                : ControlError(
                    ENOTSOCK, "\(path) is not a socket: name qbdd's control socket with --socket or QBD_SOCKET")
        case EACCES, EPERM:
            ControlError(
                EPERM, "no permission to ask qbdd at \(path): be root, or a member of the group qbd")
        case EAGAIN:
            ControlError(
                ETIMEDOUT, "qbdd at \(path) took no connection within \(timeout): too many commands wait for it")
        case EPIPE, ECONNRESET: describe(.closed)
        case EPROTOTYPE: wrongSocket
        case let code: ControlError(code, "cannot ask qbdd at \(path): \(String(cString: strerror(code)))")
        }
    }

    private static let howToStart =
        "start it with 'systemctl start qbdd', or 'qbdd', or name its socket with --socket or QBD_SOCKET"
}

extension FileIdentity {
    /// Whether the path leads to a socket.
    static func isSocket(_ path: String) -> Bool {
        var status = stat()
        return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
    }
}
