import Backend
import EventLoop
import Synchronization

/// One thread for work that may block: netlink, sysfs, the state folder. Work runs in the order given. What waits for a
/// volume's store, or for a device's own I/O, runs `Aside`: it may take for ever.
final class BlockingThread: Sendable {
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

    /// `Aside.run` for work that has to be done: where there can be no thread of its own, the blocking one does it.
    static func always<Value: Sendable>(
        on blocking: BlockingThread, _ body: @escaping @Sendable () -> Value
    ) async -> Value {
        do throws(BackendError) { return try await Aside.run { () throws(BackendError) in body() } } catch {
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
