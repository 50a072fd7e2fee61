import EventLoop
import FoundationEssentials
import Glibc
import NIOCore
import NIOHTTP1
import NIOPosix

/// Gives orders to other stores over HTTP.
struct StoreCaller: Sendable {
    private static let connectTime = TimeAmount.seconds(2)
    private static let answerTime = TimeAmount.seconds(5)
    /// Of a snapshot, before which all that was written has to be on the disk.
    private static let snapshotTime = TimeAmount.seconds(60)

    let group: MultiThreadedEventLoopGroup
    /// Of their HTTP.
    let port: Int

    /// The store could not be asked.
    struct Unreachable: Error, CustomStringConvertible {
        var description: String
        /// It has got the order, or part of it.
        var mayObey = true
    }

    private struct NotConnected: Error, CustomStringConvertible {
        let description: String
    }

    /// - Returns: nil when the store did it, or why it did not.
    func send(_ order: VolumeOrder, to store: String) async throws(Unreachable) -> RefusedRequest? {
        let uri = "/api?op=\(order.op)&name=\(order.volumeName)"
        let body = StoreJSON.encode(order)
        let bytes: [UInt8]
        let time = order.op == "create_snapshot" ? Self.snapshotTime : Self.answerTime
        do { bytes = try await post(uri, body, store, within: time) } catch {
            throw Unreachable(
                description: "the store \(store):\(port) cannot be asked: \(error)", mayObey: !(error is NotConnected))
        }
        do throws(RefusedRequest) {
            let answer = try StoreJSON.decode(PlainAnswer.self, from: bytes)
            guard answer.retCode != 0 else { return nil }
            return RefusedRequest(
                RefusedRequest.Code(rawValue: answer.retCode) ?? .remote, answer.reason ?? "no reason")
        } catch { throw Unreachable(description: "the store \(store):\(port): \(error)") }
    }

    /// Whether it answers at all, whatever it says.
    func answers(_ store: String) async -> Bool { await (try? post("/", "", store, within: .seconds(1))) != nil }

    private func post(
        _ uri: String, _ body: String, _ store: String, within time: TimeAmount
    ) async throws -> [UInt8] {
        let loop = group.any()
        let promise = loop.makePromise(of: [UInt8].self)
        let deadline = loop.scheduleTask(in: time) {
            promise.fail(Unreachable(description: "no answer within \(time.nanoseconds / 1_000_000_000) s"))
        }
        let host = "\(store):\(port)"
        ClientBootstrap(group: loop).connectTimeout(Self.connectTime).channelInitializer { channel in
            channel.eventLoop.makeCompletedFuture {
                try channel.pipeline.syncOperations.addHTTPClientHandlers()
                try channel.pipeline.syncOperations.addHandler(
                    StoreExchange(uri: uri, host: host, body: body, promise: promise))
            }
        }.connect(host: store, port: port).whenComplete { result in
            switch result {
            case .failure(let error): promise.fail(NotConnected(description: "\(error)"))
            case .success(let channel): promise.futureResult.whenComplete { _ in channel.close(promise: nil) }
            }
        }
        promise.futureResult.whenComplete { _ in deadline.cancel() }
        return try await promise.futureResult.get()
    }
}

/// One order and its answer.
private final class StoreExchange: ChannelInboundHandler {
    typealias InboundIn = HTTPClientResponsePart
    typealias OutboundOut = HTTPClientRequestPart

    private let uri: String
    private let host: String
    private let body: String
    private let promise: EventLoopPromise<[UInt8]>
    private var answer: [UInt8] = []

    init(uri: String, host: String, body: String, promise: EventLoopPromise<[UInt8]>) {
        self.uri = uri
        self.host = host
        self.body = body
        self.promise = promise
    }

    func channelActive(context: ChannelHandlerContext) {
        let bytes = ByteBuffer(string: body)
        let headers: HTTPHeaders = [
            "Host": host, "Content-Type": "application/json", "Content-Length": "\(bytes.readableBytes)",
            "Connection": "close",
        ]
        context.write(
            Self.wrapOutboundOut(.head(HTTPRequestHead(version: .http1_1, method: .POST, uri: uri, headers: headers))),
            promise: nil)
        context.write(Self.wrapOutboundOut(.body(.byteBuffer(bytes))), promise: nil)
        context.writeAndFlush(Self.wrapOutboundOut(.end(nil)), promise: nil)
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        switch Self.unwrapInboundIn(data) {
        case .head: break
        case .body(let part):
            answer += part.readableBytesView
            if answer.count > HTTPService.maximumBody {
                promise.fail(StoreCaller.Unreachable(description: "its answer is too long"))
            }
        case .end: promise.succeed(answer)
        }
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) { promise.fail(error) }

    func channelInactive(context: ChannelHandlerContext) {
        promise.fail(StoreCaller.Unreachable(description: "it closed the connection without an answer"))
    }
}
