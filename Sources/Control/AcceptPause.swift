import NIOCore

/// Lets clients of a listening socket wait in the backlog for a while when they cannot be accepted: without descriptors,
/// accept(2) would be tried again at once, for as long as that lasts. NIO's `AcceptBackoffHandler` holds back a read that
/// an accept that failed has left pending, and so nothing.
final class AcceptPause: ChannelInboundHandler {
    typealias InboundIn = Channel

    private static let pause = TimeAmount.milliseconds(100)

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        let channel = context.channel
        // Both fail only when the socket has been closed.
        _ = channel.setOption(.autoRead, value: false)
        context.eventLoop.scheduleTask(in: Self.pause) { _ = channel.setOption(.autoRead, value: true) }
    }
}
