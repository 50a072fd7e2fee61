import Testing
import Volumes

@Suite("Health")
struct HealthTests {
    /// The whole table once more, as a person would write it: `.` stays, `*` goes to the good state that fits.
    private static let table = """
                       idle          active        degraded      slow          reconnecting  failed  read-only
        busy           active        .             .             .             .             .       .
        quiet          .             idle          .             .             .             .       .
        ioSlow         slow          slow          .             .             .             .       slow
        ioFailed       degraded      degraded      .             degraded      .             .       degraded
        flushFailed    failed        failed        failed        failed        failed        .       failed
        writeProtected read-only     read-only     .             .             .             .       .
        written        .             .             .             .             .             .       *
        pathLost       degraded      degraded      .             degraded      .             .       degraded
        connectionLost reconnecting  reconnecting  reconnecting  reconnecting  .             .       reconnecting
        connected      .             .             .             .             .             .       .
        gaveUp         failed        failed        failed        failed        failed        .       failed
        settled        .             .             *             *             *             *       .
        """

    private static let second: UInt64 = 1_000_000_000

    /// A machine that events have brought into a state.
    private static func machine(in state: HealthState) -> HealthMachine {
        var machine = HealthMachine(isReadOnly: false, now: second)
        switch state {
        case .idle: break
        case .readOnly: machine.handle(.writeProtected, now: second)
        case .active: machine.handle(.busy, now: second)
        case .degraded: machine.handle(.ioFailed, now: second)
        case .slow: machine.handle(.ioSlow, now: second)
        case .reconnecting: machine.handle(.connectionLost, now: second)
        case .failed: machine.handle(.gaveUp, now: second)
        }
        return machine
    }

    @Test("every event in every state does what the table says")
    func everyCell() throws {
        let lines = Self.table.split(separator: "\n").map { $0.split(separator: " ").map(String.init) }
        let columns = try lines[0].map { try #require(HealthState(rawValue: $0)) }
        #expect(columns == HealthState.allCases)
        #expect(lines.dropFirst().map { $0[0] } == HealthEvent.allCases.map { "\($0)" })
        for (event, cells) in zip(HealthEvent.allCases, lines.dropFirst()) {
            for (state, cell) in zip(columns, cells.dropFirst()) {
                var machine = Self.machine(in: state)
                #expect(machine.state == state)
                let changed = machine.handle(event, now: 2 * Self.second)
                // Nothing was heard of requests: the good state is idle.
                let expected = cell == "." ? state : cell == "*" ? .idle : try #require(HealthState(rawValue: cell))
                #expect(machine.state == expected, "\(event) in \(state)")
                #expect(changed == (expected != state))
                #expect(machine.since == (changed ? 2 : 1) * Self.second)
            }
        }
    }

    @Test("after a slow request it counts as good when nothing bad was seen for 2 s")
    func debounce() {
        var machine = HealthMachine(isReadOnly: false, now: 0)
        machine.handle(.busy, now: 0)
        machine.handle(.ioSlow, now: 10 * Self.second)
        #expect(machine.tick(now: 12 * Self.second - 1) == false)
        #expect(machine.state == .slow)
        machine.handle(.ioSlow, now: 12 * Self.second - 1)
        #expect(machine.tick(now: 13 * Self.second) == false)
        #expect(machine.tick(now: 14 * Self.second - 1) == true)
        #expect(machine.state == .active && machine.since == 14 * Self.second - 1)
    }

    @Test("a link that flaps does not make the state flap", arguments: [1, 10, 1_999] as [UInt64])
    func flapping(milliseconds: UInt64) {
        var machine = HealthMachine(isReadOnly: false, now: 0)
        var now: UInt64 = 0
        var changes = 0
        for _ in 0..<100 {
            changes += machine.handle(.connectionLost, now: now) ? 1 : 0
            now += 5 * Self.second
            // However long it takes, a lost connection is not good.
            changes += machine.tick(now: now) ? 1 : 0
            changes += machine.handle(.connected, now: now) ? 1 : 0
            now += milliseconds * 1_000_000
            changes += machine.tick(now: now) ? 1 : 0
        }
        #expect(changes == 1 && machine.state == .reconnecting)
        machine.handle(.connected, now: now)
        #expect(machine.tick(now: now + 2 * Self.second) == true)
        #expect(machine.state == .idle)
    }

    @Test("writes that may be lost are not forgotten, and whoever gave up may come back")
    func failed() {
        var machine = HealthMachine(isReadOnly: false, now: 0)
        machine.handle(.gaveUp, now: 0)
        #expect(machine.tick(now: 100 * Self.second) == false)
        machine.handle(.connected, now: 100 * Self.second)
        #expect(machine.tick(now: 101 * Self.second) == false)
        #expect(machine.tick(now: 102 * Self.second) == true)
        machine.handle(.flushFailed, now: 103 * Self.second)
        machine.handle(.connected, now: 104 * Self.second)
        #expect(machine.tick(now: 10_000 * Self.second) == false)
        #expect(machine.state == .failed)
    }

    @Test("what was read-only before, or became so meanwhile, is read-only afterwards")
    func readOnly() {
        var machine = HealthMachine(isReadOnly: true, now: 0)
        machine.handle(.busy, now: 0)
        machine.handle(.ioSlow, now: 0)
        #expect(machine.tick(now: 2 * Self.second) == true)
        #expect(machine.state == .readOnly)
        machine = HealthMachine(isReadOnly: false, now: 0)
        machine.handle(.ioFailed, now: 0)
        machine.handle(.writeProtected, now: 0)
        #expect(machine.tick(now: 2 * Self.second) == true)
        #expect(machine.state == .readOnly)
    }

    @Test("what takes a write again is not read-only any more")
    func written() {
        var machine = HealthMachine(isReadOnly: false, now: 0)
        machine.handle(.busy, now: 0)
        machine.handle(.writeProtected, now: 0)
        #expect(machine.state == .readOnly && machine.refusesWrites)
        machine.handle(.written, now: 1)
        #expect(machine.state == .active && !machine.refusesWrites)
        // While it is bad for another reason, that is kept.
        machine.handle(.ioFailed, now: 2)
        machine.handle(.writeProtected, now: 3)
        machine.handle(.written, now: 4)
        #expect(machine.tick(now: 4 + 2 * Self.second) == true)
        #expect(machine.state == .active)
    }
}
