import EventLoop
import Glibc
import Logging

/// For the fault switches `belief` and `exit_on_return`: which stores the conductor takes for alive. As a PureFlash
/// conductor does, it takes a dead store for alive until a ZooKeeper session would have ended, and its process ends when a
/// store comes back.
actor StoreBeliefs {
    private static let pause: UInt64 = 100_000_000

    private let caller: StoreCaller
    private let stores: [String]
    private let faults: Faults
    private let logger: Logger
    /// Monotonic nanoseconds of the last answer, and whether the last look found one.
    private var seen: [String: (at: UInt64, answers: Bool)] = [:]

    init(_ caller: StoreCaller, stores: [String], faults: Faults, logger: Logger) {
        self.caller = caller
        self.stores = stores
        self.faults = faults
        self.logger = logger
    }

    var isOn: Bool { faults.isOn(.belief) || faults.isOn(.exitOnReturn) }

    /// Until the task is cancelled.
    func run() async {
        while !Task.isCancelled {
            if isOn { await look() }
            // Only cancellation ends it early.
            try? await Task.sleep(nanoseconds: Self.pause)
        }
    }

    private func look() async {
        for store in stores {
            let answers = await caller.answers(store)
            let before = seen[store]
            if answers, before?.answers == false, faults.isOn(.exitOnReturn) {
                logger.error("fault: the store \(store) is back; the conductor ends")
                exit(1)
            }
            let now = monotonicNanoseconds()
            seen[store] = (answers ? now : before?.at ?? now, answers)
        }
    }

    func believes(in store: String) -> Bool {
        guard isOn, let last = seen[store] else { return true }
        return last.answers || monotonicNanoseconds() - last.at < UInt64(faults.value(.belief)) * 1_000_000
    }
}
