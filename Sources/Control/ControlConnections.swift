import NIOCore

/// The open connections of a ``ControlServer``: how many there are, and their end when the server stops.
final class ControlConnections: Sendable {
    private struct State {
        var open: [ObjectIdentifier: ControlConnection] = [:]
        /// Set when the server stops; fulfilled when the last connection has closed.
        var drained: EventLoopPromise<Void>?
    }

    private let loop: any EventLoop
    private let limit: Int
    private let state: NIOLoopBoundBox<State>

    init(loop: any EventLoop, limit: Int) {
        self.loop = loop
        self.limit = limit
        state = .makeBoxSendingValue(State(), eventLoop: loop)
    }

    /// On the server's loop.
    ///
    /// - Returns: false when the connection is one too many and is to be refused.
    func add(_ connection: ControlConnection) -> Bool {
        state.value.open[ObjectIdentifier(connection)] = connection
        return state.value.open.count <= limit && state.value.drained == nil
    }

    /// On the server's loop.
    func remove(_ connection: ControlConnection) {
        state.value.open[ObjectIdentifier(connection)] = nil
        if state.value.open.isEmpty { state.value.drained?.succeed() }
    }

    /// Closes what waits for a request, waits for what is being answered, then closes that too.
    func drain(within grace: Duration) async {
        let promise = loop.makePromise(of: Void.self)
        loop.execute { [self] in
            state.value.drained = promise
            guard !state.value.open.isEmpty else { return promise.succeed() }
            for connection in state.value.open.values { connection.closeUnlessAnswering() }
            loop.scheduleTask(in: TimeAmount(grace)) { [self] in
                for connection in state.value.open.values { connection.close() }
            }
        }
        // The promise is only ever fulfilled.
        try? await promise.futureResult.get()
    }
}
