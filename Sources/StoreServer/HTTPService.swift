import FoundationEssentials
import NIOCore
import NIOHTTP1
import NIOPosix

/// A request of the conductor's or a store's HTTP.
struct HTTPQuery: Sendable {
    var isPost: Bool
    /// Without the query.
    var path: String
    /// Decoded; of a name that comes twice, the last.
    var parameters: [String: String]
    var body: [UInt8]

    var operation: String { parameters["op"] ?? "" }

    init(isPost: Bool, uri: String, body: [UInt8]) {
        self.isPost = isPost
        let parts = uri.split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
        path = String(parts[0])
        parameters = [:]
        for pair in (parts.count > 1 ? parts[1] : "").split(separator: "&") {
            let halves = pair.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            parameters[Self.unescaped(halves[0])] = halves.count > 1 ? Self.unescaped(halves[1]) : ""
        }
        self.body = body
    }

    private static func unescaped(_ text: Substring) -> String {
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            if byte == UInt8(ascii: "%"), rest.count >= 2,
                let value = UInt8(String(decoding: rest.prefix(2), as: UTF8.self), radix: 16)
            {
                bytes.append(value)
                rest = rest.dropFirst(2)
            } else {
                bytes.append(byte == UInt8(ascii: "+") ? UInt8(ascii: " ") : byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }
}

/// An HTTP server on a TCP address: one request a connection, answered with JSON and status 200, or with nothing.
/// Requests are bounded in size and in time, connections in number.
final class HTTPService: Sendable {
    static let maximumBody = 1 << 20
    static let requestTime = TimeAmount.seconds(10)
    static let answerTime = TimeAmount.seconds(30)
    private static let maximumConnections = 512

    private let listener: any Channel
    private let group: MultiThreadedEventLoopGroup

    /// - Parameter answer: the body of the answer; nil closes the connection without one.
    init(
        group: MultiThreadedEventLoopGroup, host: String, port: Int,
        answer: @escaping @Sendable (HTTPQuery) async -> String?
    ) async throws {
        self.group = group
        var limits = NIOHTTPDecoderLimitConfiguration()
        limits.maxHeaderFieldSize = 16 << 10
        limits.maxHeaderListSize = 16 << 10
        limits.maxHeaderFieldCount = 64
        let open = NIOLoopBoundBox.makeBoxSendingValue(0, eventLoop: group.any())
        listener = try await ServerBootstrap(group: group)
            .serverChannelOption(.backlog, value: 512)
            .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
            .childChannelOption(.allowRemoteHalfClosure, value: true)
            .childChannelInitializer { [limits] channel in
                channel.eventLoop.makeCompletedFuture {
                    guard open.value < Self.maximumConnections else { throw ChannelError.eof }
                    open.value += 1
                    channel.closeFuture.whenComplete { _ in open.value -= 1 }
                    try channel.pipeline.syncOperations.configureHTTPServerPipeline(
                        withPipeliningAssistance: false, withErrorHandling: false,
                        withOutboundHeaderValidation: false, withEncoderConfiguration: .init(),
                        withDecoderLimitConfiguration: limits)
                    try channel.pipeline.syncOperations.addHandler(HTTPConnection(answer: answer))
                }
            }
            .bind(host: host, port: port).get()
    }

    func stop() async {
        // Fails only when it has closed already.
        try? await listener.close()
    }
}

/// One client. On the server's thread.
private final class HTTPConnection: ChannelInboundHandler {
    typealias InboundIn = HTTPServerRequestPart
    typealias OutboundOut = HTTPServerResponsePart

    private let answer: @Sendable (HTTPQuery) async -> String?
    private var head: HTTPRequestHead?
    private var body: [UInt8] = []
    private var answering = false
    private var deadline: Scheduled<Void>?
    private var context: ChannelHandlerContext?

    init(answer: @escaping @Sendable (HTTPQuery) async -> String?) { self.answer = answer }

    func handlerRemoved(context: ChannelHandlerContext) { self.context = nil }

    func handlerAdded(context: ChannelHandlerContext) {
        self.context = context
        expect(within: HTTPService.requestTime)
    }

    func channelInactive(context: ChannelHandlerContext) { deadline?.cancel() }

    private func expect(within time: TimeAmount) {
        deadline?.cancel()
        deadline = context?.eventLoop.assumeIsolated().scheduleTask(in: time) { self.context?.close(promise: nil) }
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        guard !answering else { return }
        switch Self.unwrapInboundIn(data) {
        case .head(let head): self.head = head
        case .body(let part):
            body += part.readableBytesView
            if body.count > HTTPService.maximumBody { context.close(promise: nil) }
        case .end:
            guard let head else { return }
            guard head.method == .GET || head.method == .POST else { return send(nil, status: .methodNotAllowed) }
            answering = true
            deadline?.cancel()
            let query = HTTPQuery(isPost: head.method == .POST, uri: head.uri, body: body)
            body = []
            let answer = answer
            context.eventLoop.makeFutureWithTask { await answer(query) }.assumeIsolated().whenSuccess { text in
                guard let text else {
                    self.context?.close(promise: nil)
                    return
                }
                self.send(text, status: .ok)
            }
        }
    }

    func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
        guard case ChannelEvent.inputClosed = event else { return context.fireUserInboundEventTriggered(event) }
        if !answering { context.close(promise: nil) }
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        guard error is HTTPParserError, head == nil, !answering else { return context.close(promise: nil) }
        send(nil, status: .badRequest)
    }

    private func send(_ text: String?, status: HTTPResponseStatus) {
        guard let context else { return }
        answering = true
        expect(within: HTTPService.answerTime)
        let body = ByteBuffer(string: text ?? "")
        let headers: HTTPHeaders = [
            "Content-Type": "text/json; charset=UTF-8", "Content-Length": "\(body.readableBytes)",
            "Connection": "close", "Server": "qbd-store",
        ]
        context.write(
            Self.wrapOutboundOut(.head(HTTPResponseHead(version: .http1_1, status: status, headers: headers))),
            promise: nil)
        context.write(Self.wrapOutboundOut(.body(.byteBuffer(body))), promise: nil)
        context.writeAndFlush(Self.wrapOutboundOut(.end(nil))).assumeIsolated().whenComplete { _ in
            self.context?.close(promise: nil)
        }
    }
}
