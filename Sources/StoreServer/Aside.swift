import Backend
import EventLoop

/// Work that may wait for a disk, on a thread of its own: on one of the threads of the tasks it would hold up the
/// answers to everybody else.
enum Aside {
    /// Fails as the work does, or when there can be no thread; nothing of it was done then.
    static func run<Value: Sendable>(
        _ work: @escaping @Sendable () throws(BackendError) -> Value
    ) async throws(BackendError) -> Value {
        let answer = Answer<Result<Value, BackendError>>()
        let failure = await start {
            do throws(BackendError) { answer.set(.success(try work())) } catch { answer.set(.failure(error)) }
        }
        if let failure { throw BackendError(failure) }
        return try answer.take { preconditionFailure("the thread gave no answer") }.get()
    }

    /// The same for work that has to be done: where there can be no thread, the caller's does it.
    static func always(_ work: @escaping @Sendable () -> Void) async {
        if await start(work) != nil { work() }
    }

    /// - Returns: nil when the work is done, or why it was not begun.
    private static func start(_ work: @escaping @Sendable () -> Void) async -> SystemError? {
        await withCheckedContinuation { continuation in
            do throws(SystemError) {
                try Thread(name: "store:disk") {
                    work()
                    continuation.resume(returning: nil)
                }.detach()
            } catch { continuation.resume(returning: error) }
        }
    }
}
