import Synchronization

/// A value that one thread leaves for a task. The lock is for the eyes of a thread sanitizer, which does not see that
/// resuming a continuation orders what came before it.
package final class Answer<Value: Sendable>: Sendable {
    private let value = Mutex<Value?>(nil)

    package init() {}

    package func set(_ value: Value) { self.value.withLock { $0 = value } }

    /// - Parameter missing: what stands for a value that was never set.
    package func take(_ missing: () -> Value) -> Value { value.withLock { $0 } ?? missing() }
}
