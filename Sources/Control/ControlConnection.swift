import Glibc
import NIOCore
import NIOHTTP1

/// One client of the control socket, from its first byte to the last of its answer. On the server's loop.
final class ControlConnection: ChannelInboundHandler {
    typealias InboundIn = HTTPServerRequestPart
    typealias OutboundOut = HTTPServerResponsePart

    private enum State {
        /// Nothing but perhaps a part of the header has come.
        case waiting
        case receiving(Command, ByteBuffer)
        /// The request is complete or refused; whatever else comes is not read.
        case answering
        case closed
    }

    private let router: ControlRouter
    private let limits: ControlServer.Limits
    private let connections: ControlConnections
    private let report: @Sendable (String) -> Void
    private var state = State.waiting
    private var deadline: Scheduled<Void>?
    private var context: ChannelHandlerContext?

    init(
        router: ControlRouter, limits: ControlServer.Limits, connections: ControlConnections,
        report: @escaping @Sendable (String) -> Void
    ) {
        self.router = router
        self.limits = limits
        self.connections = connections
        self.report = report
    }

    func handlerAdded(context: ChannelHandlerContext) {
        self.context = context
    }

    func handlerRemoved(context: ChannelHandlerContext) {
        self.context = nil
    }

    func channelActive(context: ChannelHandlerContext) {
        guard connections.add(self) else {
            refuse(
                ControlError(EAGAIN, "qbdd has too many connections open, or is stopping; try again"),
                status: .serviceUnavailable)
            return
        }
        setDeadline(limits.request) { connection in
            connection.complain("took longer than \(connection.limits.request) to send a request")
            connection.refuse(
                ControlError(ETIMEDOUT, "the request took longer than \(connection.limits.request)"),
                status: .requestTimeout)
        }
    }

    func channelInactive(context: ChannelHandlerContext) {
        deadline?.cancel()
        state = .closed
        connections.remove(self)
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        switch (Self.unwrapInboundIn(data), state) {
        case (.head(let head), .waiting): begin(head)
        case (.body(var bytes), .receiving(let command, var body)):
            guard body.readableBytes + bytes.readableBytes <= limits.body else { return refuseSize() }
            // The buffer must have one owner to grow in place.
            state = .waiting
            body.writeBuffer(&bytes)
            state = .receiving(command, body)
        case (.end, .receiving(let command, let body)): answer(command, body)
        default: break
        }
    }

    func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
        guard case ChannelEvent.inputClosed = event else { return context.fireUserInboundEventTriggered(event) }
        // The client sends no more. It may still read its answer; without a request there will be none.
        closeUnlessAnswering()
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        guard let error = error as? HTTPParserError else { return close() }
        guard case .waiting = state else {
            if case .receiving = state { complain("broke off in the middle of a request") }
            return close()
        }
        complain("sent something that is not HTTP: \(error)")
        let tooLong = error == .headerOverflow
        refuse(
            .invalid(tooLong ? "the request's header is too long" : "this is not an HTTP request"),
            status: tooLong ? .requestHeaderFieldsTooLarge : .badRequest)
    }

    func closeUnlessAnswering() {
        if case .answering = state { return }
        close()
    }

    func close() {
        state = .closed
        context?.close(promise: nil)
    }
}

// MARK: - Request

extension ControlConnection {
    private func begin(_ head: HTTPRequestHead) {
        guard let command = Command(path: head.uri) else {
            return refuse(
                ControlError(ENOSYS, "qbdd \(ProductVersion.string) has no command at this path"), status: .notFound)
        }
        guard head.method == .POST else {
            return refuse(
                .invalid("\(command.ioctlName) is asked for with POST"), command, status: .methodNotAllowed,
                extraHeaders: [("allow", "POST")])
        }
        if let announced = head.headers.first(name: "content-length").flatMap({ Int($0) }), announced > limits.body {
            return refuseSize()
        }
        state = .receiving(command, ByteBuffer())
        if head.headers[canonicalForm: "expect"].contains("100-continue") {
            context?.writeAndFlush(
                Self.wrapOutboundOut(.head(HTTPResponseHead(version: .http1_1, status: .continue))), promise: nil)
        }
    }

    private func answer(_ command: Command, _ body: ByteBuffer) {
        guard let context else { return }
        let caller: ControlCaller
        do throws(ControlError) { caller = try self.caller(context) } catch {
            return refuse(error, command, status: .internalServerError)
        }
        state = .answering
        deadline?.cancel()
        stopReading()
        let router = router
        connections.commandBegins()
        context.eventLoop.makeFutureWithTask {
            await router.reply(to: command, body: body, for: caller)
        }.assumeIsolated().whenSuccess { reply in
            self.send(reply)
            self.connections.commandEnded()
        }
    }

    private func caller(_ context: ChannelHandlerContext) throws(ControlError) -> ControlCaller {
        let caller: Result<ControlCaller, ControlError>?
        do {
            caller = try context.pipeline.syncOperations.withUnsafeTransportIfAvailable {
                (socket: NIOBSDSocket.Handle) in
                Result { () throws(ControlError) in try ControlCaller(atOtherEndOf: socket) }
            }
        } catch {
            throw ControlError(EIO, "qbdd cannot tell who asks: \(error)")
        }
        guard let caller else { throw ControlError(EIO, "qbdd cannot tell who asks: this is no socket") }
        return try caller.get()
    }

    private func refuseSize() {
        complain("sent a request of more than \(limits.body) bytes")
        refuse(ControlError(E2BIG, "the request is longer than \(limits.body) bytes"), status: .payloadTooLarge)
    }

    private func refuse(
        _ error: ControlError, _ command: Command? = nil, status: HTTPResponseStatus,
        extraHeaders: [(String, String)] = []
    ) {
        state = .answering
        deadline?.cancel()
        stopReading()
        send(ControlRouter.failure(error, command, status: status, extraHeaders: extraHeaders))
    }

    private func complain(_ what: String) {
        report("a client of the control socket \(what)")
    }
}

// MARK: - Answer

extension ControlConnection {
    private func send(_ reply: ControlRouter.Reply) {
        guard case .answering = state, let context else { return }
        let body = ByteBuffer(string: reply.body)
        var headers = HTTPHeaders([
            ("server", Self.serverName),
            ("content-type", "application/json"),
            ("content-length", String(body.readableBytes)),
            ("connection", "close"),
        ])
        headers.add(contentsOf: reply.extraHeaders)
        setDeadline(limits.answer) { $0.close() }
        context.write(
            Self.wrapOutboundOut(.head(HTTPResponseHead(version: .http1_1, status: reply.status, headers: headers))),
            promise: nil)
        context.write(Self.wrapOutboundOut(.body(.byteBuffer(body))), promise: nil)
        context.writeAndFlush(Self.wrapOutboundOut(.end(nil))).assumeIsolated().whenComplete { _ in self.close() }
    }

    /// By this a client knows that it speaks to qbdd.
    static let serverName = "qbdd/\(ProductVersion.string)"

    private func stopReading() {
        // Fails only on a channel that has closed meanwhile.
        context?.channel.setOption(.autoRead, value: false).whenFailure { _ in }
    }

    private func setDeadline(_ time: Duration, _ action: @escaping (ControlConnection) -> Void) {
        deadline?.cancel()
        deadline = context?.eventLoop.assumeIsolated().scheduleTask(in: TimeAmount(time)) { action(self) }
    }
}
