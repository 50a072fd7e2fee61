import Synchronization

/// Switches that make the store and its conductor misbehave, for tests of their clients. Any thread.
///
/// Some are what a PureFlash cluster was seen to do: `belief`, `apart`, `read_only`, `damaging_resize`,
/// `exit_on_return`, `close_first`, `room`, `full`.
package final class Faults: Sendable {
    package enum Switch: String, CaseIterable, Sendable {
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
        case wrongID = "wrong_id"
        /// So many replies are cut in the middle, and the connection closed.
        case half
        /// So many writes to the volume itself are answered with READONLY.
        case readOnly = "read_only"
        /// Not 0: every write is answered with REOPEN, as if there were no space.
        case full
        /// So many connections are closed right after a good handshake.
        case closeFirst = "close_first"
        /// Not 0: connections of all volumes together that the store has room for.
        case room
        /// Not 0: the conductor names no store for any shard.
        case emptyStores = "empty_stores"
        /// Not 0: the conductor closes every connection without an answer.
        case silentConductor = "silent_conductor"
        /// Milliseconds for which the conductor believes in a store that has died. One that does not take an order in that
        /// time is written off: its shards have no store from then on.
        case belief
        /// Milliseconds between the orders of a snapshot to one store and to the next; not 0 lets several make one.
        case apart
        /// Not 0: the conductor writes down any size of a volume that grows, and adds no shards.
        case damagingResize = "damaging_resize"
        /// Not 0: the conductor's process ends when a store comes back.
        case exitOnReturn = "exit_on_return"
    }

    /// What was seen since the start.
    package enum Counter: String, CaseIterable, Sendable {
        case opens, handshakes, commands
    }

    private struct State {
        var values: [Switch: Int] = [:]
        var seen: [Counter: Int] = [:]
        var guests = 0
    }
    private let state = Mutex(State())

    package init() {}

    package func value(_ name: Switch) -> Int { state.withLock { $0.values[name] ?? 0 } }

    package func isOn(_ name: Switch) -> Bool { value(name) > 0 }

    package func set(_ name: Switch, to value: Int) { state.withLock { $0.values[name] = value } }

    /// Takes one from a switch that counts down; false when it is off.
    package func spend(_ name: Switch) -> Bool {
        state.withLock { state in
            guard let value = state.values[name], value > 0 else { return false }
            state.values[name] = value - 1
            return true
        }
    }

    /// Takes a place for a connection, if there is room.
    func admit() -> Bool {
        state.withLock { state in
            if let room = state.values[.room], room > 0, state.guests >= room { return false }
            state.guests += 1
            return true
        }
    }

    func dismiss() { state.withLock { $0.guests -= 1 } }

    func count(_ name: Counter) { state.withLock { $0.seen[name, default: 0] += 1 } }

    package func seen(_ name: Counter) -> Int { state.withLock { $0.seen[name] ?? 0 } }
}
