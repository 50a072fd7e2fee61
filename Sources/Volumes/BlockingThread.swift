import Backend
import EventLoop
import Synchronization

/// One thread for work that may block: netlink, sysfs, the state folder. Work runs in the order given. What waits for a
/// volume's store, or for a device's own I/O, runs `alone`: it may take for ever.
package final class BlockingThread: Sendable {
    private let queue = Mutex<[@Sendable () -> Void]>([])
    private let available = Semaphore()

    init(name: String = "qbd:blocking") throws(SystemError) {
        // The thread lives as long as the process: it holds itself.
        _ = try Thread(name: name) { [self] in
            while true {
                available.wait()
                let work = queue.withLock { $0.isEmpty ? nil : $0.removeFirst() }
                work?()
            }
        }
    }

    func run<Value: Sendable, Failure: Error>(
        _ body: @escaping @Sendable () throws(Failure) -> Value
    ) async throws(Failure) -> Value {
        let answer = Answer<Result<Value, Failure>>()
        await withCheckedContinuation { continuation in
            queue.withLock { queue in
                queue.append {
                    do throws(Failure) { answer.set(.success(try body())) } catch { answer.set(.failure(error)) }
                    continuation.resume()
                }
            }
            available.signal()
        }
        return try answer.take { preconditionFailure("the blocking thread gave no answer") }.get()
    }

    /// Runs work on a thread of its own, so that work that may wait for ever holds up nothing else.
    /// - Parameter watch: asked a few times a second while the work lasts. With an error the wait is over; the work goes
    ///   on until it ends by itself, and its value is dropped.
    package static func alone<Value: Sendable>(
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
                try Thread(name: "qbd:device") {
                    do throws(BackendError) { race.finish(.success(try body())) } catch { race.finish(.failure(error)) }
                }.detach()
            } catch { race.finish(.failure(BackendError(error))) }
        }.get()
    }

    /// The same for work that has to be done: where there can be no thread of its own, the blocking one does it.
    static func always<Value: Sendable>(
        on blocking: BlockingThread, _ body: @escaping @Sendable () -> Value
    ) async -> Value {
        do throws(BackendError) { return try await alone { () throws(BackendError) in body() } } catch {
            return await blocking.run(body)
        }
    }
}

extension Task where Success == Void, Failure == Never {
    /// Waits until the task is done; false when it is not after `seconds`.
    func isDone(within seconds: UInt64) async -> Bool {
        let race = Race<Bool>()
        let timer = Task {
            // Cancelled when the other is first.
            if (try? await Task<Never, Never>.sleep(nanoseconds: seconds * 1_000_000_000)) != nil { race.finish(false) }
        }
        defer { timer.cancel() }
        return await race.result {
            Task {
                await value
                race.finish(true)
            }
        }
    }
}

/// Takes the first of several results.
private final class Race<Value: Sendable>: Sendable {
    private enum State {
        case running
        case awaited(CheckedContinuation<Value, Never>)
        case finished(Value)
        case over
    }
    private let state = Mutex(State.running)

    func finish(_ value: Value) {
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
    func result(_ start: () -> Void) async -> Value {
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
