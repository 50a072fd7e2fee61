import EventLoop
import Glibc

/// An nbd device as sysfs shows it. Every property asks anew.
package struct KernelDevice: Sendable, Equatable {
    /// The X of /dev/nbdX.
    package let index: UInt32
    /// Where /sys, /proc and /dev are; tests put a folder here.
    package let root: String

    package init(index: UInt32, root: String = "") {
        self.index = index
        self.root = root
    }

    /// - Parameter path: `nbdX`, `/dev/nbdX`, which need not be there yet, or a link to it; nil for anything else.
    package init?(path: String, root: String = "") {
        let full = path.hasPrefix("/") ? path : "/dev/\(path)"
        let resolved = Self.resolve(root + full) ?? full
        guard let slash = resolved.lastIndex(of: "/"), resolved[..<slash].hasSuffix("/dev") else { return nil }
        let name = resolved[resolved.index(after: slash)...]
        guard name.hasPrefix("nbd"), let index = UInt32(name.dropFirst(3)), name == "nbd\(index)" else { return nil }
        self.init(index: index, root: root)
    }

    private static func resolve(_ path: String) -> String? {
        guard let resolved = realpath(path, nil) else { return nil }
        defer { free(resolved) }
        return String(cString: resolved)
    }

    package var name: String { "nbd\(index)" }
    package var path: String { "/dev/nbd\(index)" }
    var folder: String { "\(root)/sys/block/\(name)" }

    package var exists: Bool { TextFile.exists(folder) }

    /// Bytes; 0 when not connected. Sysfs counts sectors of 512 bytes whatever the block size is.
    package var size: UInt64 {
        guard let sectors = TextFile.readLine("\(folder)/size").flatMap({ UInt64($0) }) else { return 0 }
        let (bytes, overflow) = sectors.multipliedReportingOverflow(by: 512)
        return overflow ? 0 : bytes
    }

    /// Whether the driver holds connections, dead or alive, for it. Its number says nothing after a takeover.
    package var isConnected: Bool { TextFile.exists("\(folder)/pid") }

    /// The identifier given at connect; nil when there is none, or the kernel is older than 5.14.
    package var backend: String? { TextFile.readLine("\(folder)/backend").flatMap { $0.isEmpty ? nil : $0 } }

    package var identifier: DeviceIdentifier? { backend.flatMap { DeviceIdentifier($0) } }

    package var isReadOnly: Bool { TextFile.readLine("\(folder)/ro") == "1" }

    /// Requests the kernel waits for, reads and writes.
    package var inFlight: (reads: Int, writes: Int) {
        let fields = TextFile.readLine("\(folder)/inflight")?.split(separator: " ").compactMap { Int($0) } ?? []
        return fields.count == 2 ? (fields[0], fields[1]) : (0, 0)
    }

    /// Hardware queues, one for each connection made at connect unless that were more than there are processors.
    package var queues: Int { TextFile.list("\(folder)/mq").count }

    /// `nbdXpM`, by number.
    package var partitions: [String] {
        TextFile.list(folder).compactMap { entry -> (Int, String)? in
            guard entry.hasPrefix("\(name)p"), let number = Int(entry.dropFirst(name.utf8.count + 1)),
                TextFile.exists("\(folder)/\(entry)/partition")
            else { return nil }
            return (number, entry)
        }.sorted { $0.0 < $1.0 }.map(\.1)
    }

    /// Block devices on top of it or one of its partitions: `dm-0`, `md127`.
    package var holders: [String] {
        let folders = [folder] + partitions.map { "\(folder)/\($0)" }
        return Array(Set(folders.flatMap { TextFile.list("\($0)/holders") })).sorted()
    }

    /// Of the device and its partitions, each with its `major:minor`.
    package var numbers: [(name: String, number: String)] {
        ([(name, folder)] + partitions.map { ($0, "\(folder)/\($0)") }).compactMap { entry in
            TextFile.readLine("\(entry.1)/dev").map { (entry.0, $0) }
        }
    }

    /// All devices of the driver, by number.
    package static func all(root: String = "") -> [KernelDevice] {
        TextFile.list("\(root)/sys/block").compactMap { name in
            UInt32(name.dropFirst(3)).flatMap { name == "nbd\($0)" ? KernelDevice(index: $0, root: root) : nil }
        }.sorted { $0.index < $1.index }
    }

    /// Those that carry an identifier of ours.
    package static func ours(root: String = "") -> [(device: KernelDevice, identifier: DeviceIdentifier)] {
        all(root: root).compactMap { device in device.identifier.map { (device, $0) } }
    }

    /// The device of a mapping, by its cookie and name.
    package static func find(_ identifier: DeviceIdentifier, root: String = "") -> KernelDevice? {
        let text = identifier.description
        return all(root: root).first { $0.backend == text }
    }

    // MARK: Waiting

    /// Waits until a condition holds; false when it did not in time. Sysfs tells nobody about changes, so this asks in
    /// short steps.
    /// - Parameter timeout: seconds.
    package func wait(_ timeout: Double, until condition: (KernelDevice) -> Bool) -> Bool {
        Deadline(seconds: timeout).poll { condition(self) }
    }

    /// Whether the driver is done with it: another connect will not find it busy.
    package var isFree: Bool {
        guard !isConnected, holders.isEmpty else { return false }
        let inFlight = inFlight
        return inFlight.reads == 0 && inFlight.writes == 0
    }

    /// Waits until a disconnected device is free; false when it is not after `timeout` seconds, because somebody
    /// still has it open or I/O does not end.
    package func waitUntilFree(_ timeout: Double) -> Bool { wait(timeout) { $0.isFree } }
}
