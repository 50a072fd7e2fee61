import EventLoop
import Synchronization

/// Work that may wait for a disk, a store or a device, on a thread of its own, so that it holds up nothing else: neither a
/// loop, nor one of the few threads of the tasks.
package enum Aside {
    /// Fails as the work does, or when there can be no thread; nothing of it was done then.
    /// - Parameter watch: asked a few times a second while the work lasts. With an error the wait is over; the work goes
    ///   on until it ends by itself, and its value is dropped.
    package static func run<Value: Sendable>(
        watch: (@Sendable () async -> BackendError?)? = nil,
        _ body: @escaping @Sendable () throws(BackendError) -> Value
    ) async throws(BackendError) -> Value {
        let race = Race<Result<Value, BackendError>>()
        let watcher = watch.map { watch in
            Task {
                // Cancelled when the work is done.
                while (try? await Task.sleep(nanoseconds: 200_000_000)) != nil {
                    if let error = await watch() { return race.finish(.failure(error)) }
                }
            }
        }
        defer { watcher?.cancel() }
        return try await race.result {
            do throws(SystemError) {
                try Thread(name: "aside") {
                    do throws(BackendError) { race.finish(.success(try body())) } catch { race.finish(.failure(error)) }
                }.detach()
            } catch { race.finish(.failure(BackendError(error))) }
        }.get()
    }

    /// The same for work that has to be done: where there can be no thread, the caller's does it.
    package static func always(_ body: @escaping @Sendable () -> Void) async {
        do throws(BackendError) { try await run { () throws(BackendError) in body() } } catch { body() }
    }
}

/// Takes the first of several results.
package final class Race<Value: Sendable>: Sendable {
    private enum State {
        case running
        case awaited(CheckedContinuation<Value, Never>)
        case finished(Value)
        case over
    }
    private let state = Mutex(State.running)

    package init() {}

    package func finish(_ value: Value) {
        let waiting: CheckedContinuation<Value, Never>? = state.withLock { state in
            switch state {
            case .running: state = .finished(value)
            case .awaited(let continuation):
                state = .over
                return continuation
            case .finished, .over: break
            }
            return nil
        }
        waiting?.resume(returning: value)
    }

    /// Call once.
    package func result(_ start: () -> Void) async -> Value {
        start()
        return await withCheckedContinuation { continuation in
            let value: Value? = state.withLock { state in
                if case .finished(let value) = state {
                    state = .over
                    return value
                }
                state = .awaited(continuation)
                return nil
            }
            if let value { continuation.resume(returning: value) }
        }
    }
}
