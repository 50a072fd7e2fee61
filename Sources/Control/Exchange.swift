import NIOCore
import NIOHTTP1

/// One question and its answer on a client's connection. Closes it in the end.
final class Exchange: ChannelInboundHandler {
    typealias InboundIn = HTTPClientResponsePart
    typealias OutboundOut = HTTPClientRequestPart

    struct Response: Sendable {
        var head: HTTPResponseHead
        var body: ByteBuffer
    }

    enum Fault: Error {
        case timedOut
        /// The other side closed before its answer was complete.
        case closed
        /// More than ``maximumAnswer``.
        case tooLong
    }

    /// Bytes: a list of 100,000 mappings.
    static let maximumAnswer = 64 << 20

    private let command: Command
    private let body: String
    private let deadline: NIODeadline
    private var promise: EventLoopPromise<Response>?
    private var response: Response?
    private var alarm: Scheduled<Void>?

    init(command: Command, body: String, deadline: NIODeadline, promise: EventLoopPromise<Response>) {
        self.command = command
        self.body = body
        self.deadline = deadline
        self.promise = promise
    }

    func channelActive(context: ChannelHandlerContext) {
        alarm = context.eventLoop.assumeIsolated().scheduleTask(deadline: deadline) {
            self.finish(.failure(Fault.timedOut), context)
        }
        let bytes = ByteBuffer(string: body)
        let head = HTTPRequestHead(
            version: .http1_1, method: .POST, uri: command.path,
            headers: [
                "host": "qbd", "content-type": "application/json", "content-length": String(bytes.readableBytes),
                "connection": "close",
            ])
        context.write(Self.wrapOutboundOut(.head(head)), promise: nil)
        context.write(Self.wrapOutboundOut(.body(.byteBuffer(bytes))), promise: nil)
        // A write that fails is followed by the channel's end, unless an answer was there before it.
        context.writeAndFlush(Self.wrapOutboundOut(.end(nil)), promise: nil)
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        switch Self.unwrapInboundIn(data) {
        case .head(let head): response = Response(head: head, body: ByteBuffer())
        case .body(var bytes):
            guard (response?.body.readableBytes ?? 0) + bytes.readableBytes <= Self.maximumAnswer else {
                return finish(.failure(Fault.tooLong), context)
            }
            response?.body.writeBuffer(&bytes)
        case .end:
            finish(response.map { .success($0) } ?? .failure(Fault.closed), context)
        }
    }

    func channelInactive(context: ChannelHandlerContext) {
        finish(.failure(Fault.closed), context)
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        if case HTTPParserError.invalidEOFState = error { return finish(.failure(Fault.closed), context) }
        finish(.failure(error), context)
    }

    private func finish(_ result: Result<Response, any Error>, _ context: ChannelHandlerContext) {
        alarm?.cancel()
        alarm = nil
        guard let promise else { return }
        self.promise = nil
        promise.completeWith(result)
        context.close(promise: nil)
    }
}
