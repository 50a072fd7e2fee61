import Glibc
import NIOCore
import NIOHTTP1
import NIOPosix
import Synchronization

/// The daemon's side of the control socket: HTTP/1.1 with JSON, one request a connection, on one thread.
///
/// Commands run as tasks beside that thread, any number at a time. What a client sends is bounded in size and in time,
/// so a client that sends nonsense, or one byte a second, costs one connection for ``Limits/request``.
package final class ControlServer: Sendable {
    /// The bounds of a connection.
    package struct Limits: Sendable {
        /// How long a client may take to send its request; then it is told so and closed.
        package var request = Duration.seconds(10)
        /// How long a client may take to read its answer.
        package var answer = Duration.seconds(30)
        /// Bytes.
        package var body = 1 << 20
        /// Bytes of all header fields together.
        package var header = 16 << 10
        /// Open connections; one more is told to try again later.
        package var connections = 512

        package init() {}
    }

    /// Where it listens.
    package let path: String

    private let group: MultiThreadedEventLoopGroup
    private let listener: any Channel
    private let connections: ControlConnections
    private let socket: SocketOwner

    /// Starts to listen and to answer.
    ///
    /// - Parameters:
    ///   - reserved: the path of the Unix socket.
    ///   - report: called with one line about a client that broke the protocol, on the server's thread.
    package init(
        at reserved: consuming ControlPath, service: any ControlService, limits: Limits = Limits(),
        report: @escaping @Sendable (String) -> Void
    ) async throws(ControlError) {
        let path = reserved.path
        let socket = try ControlSocket.listen(at: reserved)
        let descriptor = socket.descriptor
        let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
        let connections = ControlConnections(loop: group.any(), limit: limits.connections)
        let router = ControlRouter(service: service)
        var decoding = NIOHTTPDecoderLimitConfiguration()
        decoding.maxHeaderFieldSize = limits.header
        decoding.maxHeaderListSize = limits.header
        decoding.maxHeaderFieldCount = 64
        let bootstrap = ServerBootstrap(group: group)
            .serverChannelInitializer { channel in
                channel.eventLoop.makeCompletedFuture { try channel.pipeline.syncOperations.addHandler(AcceptPause()) }
            }
            .childChannelOption(.allowRemoteHalfClosure, value: true)
            .childChannelInitializer { [decoding] channel in
                channel.eventLoop.makeCompletedFuture {
                    let pipeline = channel.pipeline.syncOperations
                    try pipeline.configureHTTPServerPipeline(
                        withPipeliningAssistance: false, withErrorHandling: false,
                        withOutboundHeaderValidation: false, withEncoderConfiguration: .init(),
                        withDecoderLimitConfiguration: decoding)
                    try pipeline.addHandler(
                        ControlConnection(router: router, limits: limits, connections: connections, report: report))
                }
            }
        do {
            listener = try await bootstrap.withBoundSocket(descriptor).get()
        } catch {
            socket.remove()
            try? await group.shutdownGracefully()
            throw ControlError(EIO, "cannot listen at \(path): \(error)")
        }
        self.path = path
        self.group = group
        self.connections = connections
        self.socket = SocketOwner(socket)
    }

    /// Takes no new connection, lets the commands that run end and be answered, closes the rest, and removes the
    /// socket's file. Call it once.
    ///
    /// - Parameter grace: how long to wait for commands that run. Those that take longer end without an answer, on the
    ///   server's thread, which stays for that.
    package func stop(grace: Duration = .seconds(10)) async {
        socket.remove()
        // Both fail only when what they end has ended already.
        try? await listener.close()
        guard await connections.drain(within: grace) else { return }
        try? await group.shutdownGracefully()
    }
}

/// Holds the socket's file until the first call of `remove`.
private final class SocketOwner: Sendable {
    private let socket: Mutex<ControlSocket?>

    init(_ socket: consuming ControlSocket) {
        self.socket = Mutex(consume socket)
    }

    func remove() {
        socket.withLock { $0.take() }?.remove()
    }
}
