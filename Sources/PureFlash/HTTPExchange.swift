import Backend
import Glibc
import NIOCore
import NIOHTTP1
import NIOPosix

/// Somebody who answers HTTP: a conductor, or a store on the port where its conductor tells it things.
package struct HTTPEndpoint: Hashable, Sendable, CustomStringConvertible {
    package let host: String
    package let port: Int
    package init(host: String, port: Int) {
        self.host = host
        self.port = port
    }
    package var description: String {
        host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]:\(port)" : "\(host):\(port)"
    }
}

/// One GET on a connection of its own. On the thread of its connection.
final class HTTPExchange: ChannelInboundHandler {
    typealias InboundIn = HTTPClientResponsePart
    typealias OutboundOut = HTTPClientRequestPart

    struct Answer: Sendable {
        let status: HTTPResponseStatus
        let body: [UInt8]
    }

    /// Bytes of an answer, far more than any cluster's.
    private static let maximumBody = 32 << 20

    private let uri: String
    /// Who is asked, for texts.
    private let peer: String
    private let host: String
    private let promise: EventLoopPromise<Answer>
    private var status = HTTPResponseStatus.ok
    private var body: [UInt8] = []

    private init(uri: String, host: String, peer: String, promise: EventLoopPromise<Answer>) {
        self.uri = uri
        self.host = host
        self.peer = peer
        self.promise = promise
    }

    /// Asks, and closes the connection when the promise is kept, by an answer or by whoever does not wait any longer.
    /// - Parameters:
    ///   - timeout: for the connection alone.
    ///   - connected: called when there is a connection: from here on the question may have been read.
    static func get(
        _ uri: String, from endpoint: HTTPEndpoint, peer: String, timeout: TimeAmount,
        promise: EventLoopPromise<Answer>,
        on loop: any NIOCore.EventLoop, connected: (@Sendable () -> Void)? = nil,
        unreachable: @escaping @Sendable (any Error) -> any Error
    ) {
        ClientBootstrap(group: loop).connectTimeout(timeout).channelInitializer { channel in
            channel.eventLoop.makeCompletedFuture {
                try channel.pipeline.syncOperations.addHTTPClientHandlers()
                try channel.pipeline.syncOperations.addHandler(
                    HTTPExchange(uri: uri, host: "\(endpoint)", peer: peer, promise: promise))
            }
        }.connect(host: endpoint.host, port: endpoint.port).whenComplete { result in
            switch result {
            case .failure(let error): promise.fail(unreachable(error))
            case .success(let channel):
                connected?()
                promise.futureResult.whenComplete { _ in channel.close(promise: nil) }
            }
        }
    }

    func channelActive(context: ChannelHandlerContext) {
        let headers: HTTPHeaders = ["Host": host, "Accept": "*/*", "Connection": "close"]
        let head = HTTPRequestHead(version: .http1_1, method: .GET, uri: uri, headers: headers)
        context.write(wrapOutboundOut(.head(head)), promise: nil)
        context.writeAndFlush(wrapOutboundOut(.end(nil)), promise: nil)
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        switch unwrapInboundIn(data) {
        case .head(let head): status = head.status
        case .body(let part):
            body += part.readableBytesView
            if body.count > Self.maximumBody { fail("sent more than \(Self.maximumBody) bytes") }
        case .end: promise.succeed(Answer(status: status, body: body))
        }
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        switch error {
        case let error as IOError:
            fail("was lost before it answered: \(String(cString: strerror(error.errnoCode)))", error.errnoCode)
        case HTTPParserError.invalidEOFState: channelInactive(context: context)
        default: fail("sent no HTTP: \(error)")
        }
    }

    func channelInactive(context: ChannelHandlerContext) {
        fail("closed the connection before it had answered", ECONNRESET)
    }

    /// After the answer, nothing more is heard of it.
    /// - Parameter code: one that says whether time will help: a conductor that ends or is started is there again soon.
    private func fail(_ what: String, _ code: Int32 = EREMOTEIO) {
        promise.fail(BackendError(code: code, message: "\(peer) \(what)"))
    }
}
