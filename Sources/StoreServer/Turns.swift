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
