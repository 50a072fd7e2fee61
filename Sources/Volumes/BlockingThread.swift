import EventLoop
import Synchronization

/// One thread for work that may block: opening volumes, directories, locks. Work runs in the order given.
final class BlockingThread: Sendable {
    private let queue = Mutex<[@Sendable () -> Void]>([])
    private let available = Semaphore()

    init() throws(SystemError) {
        // The thread lives as long as the process: it holds itself.
        _ = try Thread(name: "qbd:blocking") { [self] in
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
}
