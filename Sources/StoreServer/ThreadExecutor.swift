import EventLoop
import Synchronization

/// Runs an actor on a thread of its own, so that it may block: files, directories, locks.
final class ThreadExecutor: SerialExecutor {
    private let jobs = Mutex<[UnownedJob]>([])
    private let available = Semaphore()

    /// The thread lives as long as the process.
    init(name: String) throws(SystemError) {
        let thread = try Thread(name: name) { [self] in
            while true {
                available.wait()
                let job = jobs.withLock { $0.isEmpty ? nil : $0.removeFirst() }
                job?.runSynchronously(on: asUnownedSerialExecutor())
            }
        }
        thread.detach()
    }

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        jobs.withLock { $0.append(job) }
        available.signal()
    }
}

/// Lets work on the same thing run one after the other, in the order it came. Kept by an actor.
struct Turns {
    private var last: [String: Task<Void, Never>] = [:]

    /// The work that has to be over first, to be awaited by `next`.
    func before(_ key: String) -> Task<Void, Never>? { last[key] }

    mutating func set(_ key: String, _ task: Task<Void, Never>) { last[key] = task }

    mutating func ended(_ key: String, _ task: Task<Void, Never>) {
        if last[key] == task { last[key] = nil }
    }
}
