import Synchronization

/// Runs work on the same name one after the other, in the order asked, and on different names side by side.
package final class NameQueues: Sendable {
    private struct Tail {
        var id: UInt64
        var task: Task<Void, Never>
    }
    private struct State {
        var tails: [String: Tail] = [:]
        var nextID: UInt64 = 0
    }
    private let state = Mutex(State())

    package init() {}

    package func run<Value: Sendable, Failure: Error>(
        _ name: String, _ body: @escaping @Sendable () async throws(Failure) -> Value
    ) async throws(Failure) -> Value {
        let (task, id) = state.withLock { state in
            let previous = state.tails[name]?.task
            let id = state.nextID
            state.nextID += 1
            let task = Task { () -> Result<Value, Failure> in
                await previous?.value
                do throws(Failure) { return .success(try await body()) } catch { return .failure(error) }
            }
            state.tails[name] = Tail(id: id, task: Task { _ = await task.value })
            return (task, id)
        }
        let result = await task.value
        state.withLock { state in
            if state.tails[name]?.id == id { state.tails[name] = nil }
        }
        return try result.get()
    }
}
