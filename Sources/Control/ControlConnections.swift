import NIOCore

/// The open connections of a ``ControlServer`` and the commands that run: how many there are, and their end when the
/// server stops.
final class ControlConnections: Sendable {
    private struct State {
        var open: [ObjectIdentifier: ControlConnection] = [:]
        /// Commands that run; a client may be gone before its command has ended.
        var running = 0
        /// Commands that still run are waited for no longer.
        var graceIsOver = false
        /// Set when the server stops; fulfilled with whether every command has ended when nothing is waited for any more.
        var drained: EventLoopPromise<Bool>?
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
        settle()
    }

    /// On the server's loop.
    func commandBegins() { state.value.running += 1 }

    /// On the server's loop.
    func commandEnded() {
        state.value.running -= 1
        settle()
    }

    /// Closes what waits for a request, waits for the commands that run and for their answers, then closes those too.
    ///
    /// - Returns: whether every command has ended.
    func drain(within grace: Duration) async -> Bool {
        let promise = loop.makePromise(of: Bool.self)
        loop.execute { [self] in
            state.value.drained = promise
            for connection in state.value.open.values { connection.closeUnlessAnswering() }
            loop.scheduleTask(in: TimeAmount(grace)) { [self] in
                state.value.graceIsOver = true
                for connection in state.value.open.values { connection.close() }
                settle()
            }
            settle()
        }
        // The promise is only ever fulfilled.
        return (try? await promise.futureResult.get()) ?? false
    }

    /// What a promise is fulfilled with again counts for nothing.
    private func settle() {
        guard let drained = state.value.drained, state.value.open.isEmpty,
            state.value.running == 0 || state.value.graceIsOver
        else { return }
        drained.succeed(state.value.running == 0)
    }
}
