import Synchronization

/// Switches that make the store misbehave, for tests of its clients. Any thread.
package final class Faults: Sendable {
    package enum Switch: Int, CaseIterable, Sendable {
        /// Not 0: every handshake is refused with result 22.
        case refuse
        /// Milliseconds every command is held back before anything is done for it.
        case delay
        /// Each connection is closed at its command of this number, which is not done.
        case drop
        /// So many commands are answered with REOPEN.
        case reopen
        /// Not 0: commands are held back until this is 0 again.
        case stop
        /// So many replies are sent twice.
        case twice
        /// So many replies have another command's id.
        case wrongID
        /// So many replies are cut in the middle, and the connection closed.
        case half
        /// Not 0: the conductor names no store for any shard.
        case emptyStores
        /// Not 0: the conductor closes every connection without an answer.
        case silentConductor

        package var name: String {
            switch self {
            case .refuse: "refuse"
            case .delay: "delay"
            case .drop: "drop"
            case .reopen: "reopen"
            case .stop: "stop"
            case .twice: "twice"
            case .wrongID: "wrong_id"
            case .half: "half"
            case .emptyStores: "empty_stores"
            case .silentConductor: "silent_conductor"
            }
        }
    }

    /// What was seen since the start.
    package enum Counter: Int, CaseIterable, Sendable {
        case opens, handshakes, commands

        package var name: String {
            switch self {
            case .opens: "opens"
            case .handshakes: "handshakes"
            case .commands: "commands"
            }
        }
    }

    private struct Cell: ~Copyable { let value = Atomic<Int>(0) }
    private let refuse = Cell(), delay = Cell(), drop = Cell(), reopen = Cell(), stop = Cell(), twice = Cell()
    private let wrongID = Cell(), half = Cell(), emptyStores = Cell(), silentConductor = Cell()
    private let opens = Cell(), handshakes = Cell(), commands = Cell()

    package init() {}

    private func with<Result>(_ name: Switch, _ body: (borrowing Atomic<Int>) -> Result) -> Result {
        switch name {
        case .refuse: body(refuse.value)
        case .delay: body(delay.value)
        case .drop: body(drop.value)
        case .reopen: body(reopen.value)
        case .stop: body(stop.value)
        case .twice: body(twice.value)
        case .wrongID: body(wrongID.value)
        case .half: body(half.value)
        case .emptyStores: body(emptyStores.value)
        case .silentConductor: body(silentConductor.value)
        }
    }

    private func with<Result>(_ name: Counter, _ body: (borrowing Atomic<Int>) -> Result) -> Result {
        switch name {
        case .opens: body(opens.value)
        case .handshakes: body(handshakes.value)
        case .commands: body(commands.value)
        }
    }

    package func value(_ name: Switch) -> Int { with(name) { $0.load(ordering: .relaxed) } }

    package func set(_ name: Switch, to value: Int) { with(name) { $0.store(value, ordering: .relaxed) } }

    /// Takes one from a switch that counts down; false when it is off.
    package func spend(_ name: Switch) -> Bool {
        with(name) { cell in
            var value = cell.load(ordering: .relaxed)
            while value > 0 {
                let (done, seen) = cell.compareExchange(expected: value, desired: value - 1, ordering: .relaxed)
                if done { return true }
                value = seen
            }
            return false
        }
    }

    func count(_ name: Counter) { with(name) { _ = $0.add(1, ordering: .relaxed) } }

    package func seen(_ name: Counter) -> Int { with(name) { $0.load(ordering: .relaxed) } }
}
