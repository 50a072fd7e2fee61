import EventLoop
import Glibc

/// An nbd device as sysfs shows it. Every property asks anew, and fails when the answer cannot be read: what is not known
/// is neither "no" nor 0.
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
        guard let resolved = Self.resolve(root + full, or: full) else { return nil }
        guard let slash = resolved.lastIndex(of: "/"), resolved[..<slash].hasSuffix("/dev") else { return nil }
        let name = resolved[resolved.index(after: slash)...]
        guard name.hasPrefix("nbd"), let index = UInt32(name.dropFirst(3)), name == "nbd\(index)" else { return nil }
        self.init(index: index, root: root)
    }

    /// - Parameter missing: what stands for a path that is not there.
    private static func resolve(_ path: String, or missing: String) -> String? {
        guard let resolved = realpath(path, nil) else { return errno == ENOENT ? missing : nil }
        defer { free(resolved) }
        return String(cString: resolved)
    }

    package var name: String { "nbd\(index)" }
    package var path: String { "/dev/nbd\(index)" }
    var folder: String { "\(root)/sys/block/\(name)" }

    package var exists: Bool { get throws(SystemError) { try TextFile.exists(folder) } }

    /// Bytes; 0 when not connected. Sysfs counts sectors of 512 bytes whatever the block size is.
    package var size: UInt64 {
        get throws(SystemError) {
            let path = "\(folder)/size"
            guard let text = try TextFile.readLine(path) else { return 0 }
            guard let sectors = UInt64(text), sectors <= .max / 512 else { throw Self.malformed(path, text) }
            return sectors * 512
        }
    }

    private static func malformed(_ path: String, _ text: String) -> SystemError {
        SystemError(code: EBADMSG, operation: "read \(path)", reason: "it says '\(text)'")
    }

    /// Whether the driver holds connections, dead or alive, for it. Its number says nothing after a takeover.
    package var isConnected: Bool { get throws(SystemError) { try TextFile.exists("\(folder)/pid") } }

    /// The identifier given at connect; nil when there is none, or the kernel is older than 5.14.
    package var backend: String? {
        get throws(SystemError) {
            guard let text = try TextFile.readLine("\(folder)/backend"), !text.isEmpty else { return nil }
            return text
        }
    }

    package var identifier: DeviceIdentifier? {
        get throws(SystemError) { try backend.flatMap { DeviceIdentifier($0) } }
    }

    package var isReadOnly: Bool { get throws(SystemError) { try TextFile.readLine("\(folder)/ro") == "1" } }

    /// Requests the kernel waits for, reads and writes.
    package var inFlight: (reads: Int, writes: Int) {
        get throws(SystemError) {
            let path = "\(folder)/inflight"
            guard let text = try TextFile.readLine(path) else { return (0, 0) }
            let fields = text.split(separator: " ").compactMap { Int($0) }
            guard fields.count == 2 else { throw Self.malformed(path, text) }
            return (fields[0], fields[1])
        }
    }

    /// Hardware queues, one for each connection made at connect unless that were more than there are processors.
    package var queues: Int { get throws(SystemError) { try TextFile.list("\(folder)/mq").count } }

    /// `nbdXpM`, by number.
    package var partitions: [String] {
        get throws(SystemError) {
            var partitions: [(number: Int, name: String)] = []
            for entry in try TextFile.list(folder) where entry.hasPrefix("\(name)p") {
                guard let number = Int(entry.dropFirst(name.utf8.count + 1)),
                    try TextFile.exists("\(folder)/\(entry)/partition")
                else { continue }
                partitions.append((number, entry))
            }
            return partitions.sorted { $0.number < $1.number }.map(\.name)
        }
    }

    /// Block devices on top of it or one of its partitions: `dm-0`, `md127`.
    package var holders: [String] {
        get throws(SystemError) {
            var holders = Set(try TextFile.list("\(folder)/holders"))
            for partition in try partitions { holders.formUnion(try TextFile.list("\(folder)/\(partition)/holders")) }
            return holders.sorted()
        }
    }

    /// Of the device and its partitions, each with its `major:minor`.
    package var numbers: [(name: String, number: String)] {
        get throws(SystemError) {
            var numbers: [(name: String, number: String)] = []
            for (name, folder) in [(name, folder)] + (try partitions).map({ ($0, "\(folder)/\($0)") }) {
                if let number = try TextFile.readLine("\(folder)/dev") { numbers.append((name, number)) }
            }
            return numbers
        }
    }

    /// All devices of the driver, by number.
    package static func all(root: String = "") throws(SystemError) -> [KernelDevice] {
        try TextFile.listAlways("\(root)/sys/block").compactMap { name in
            UInt32(name.dropFirst(3)).flatMap { name == "nbd\($0)" ? KernelDevice(index: $0, root: root) : nil }
        }.sorted { $0.index < $1.index }
    }

    /// Those that carry an identifier of ours.
    package static func ours(
        root: String = ""
    ) throws(SystemError) -> [(device: KernelDevice, identifier: DeviceIdentifier)] {
        var ours: [(device: KernelDevice, identifier: DeviceIdentifier)] = []
        for device in try all(root: root) {
            if let identifier = try device.identifier { ours.append((device, identifier)) }
        }
        return ours
    }

    /// The device of a mapping, by its cookie and name; nil when none of them all is it.
    package static func find(
        _ identifier: DeviceIdentifier, root: String = ""
    ) throws(SystemError) -> KernelDevice? {
        let text = identifier.description
        var unknown: SystemError?
        for device in try all(root: root) {
            do throws(SystemError) {
                if try device.backend == text { return device }
            } catch { unknown = unknown ?? error }
        }
        if let unknown { throw unknown }
        return nil
    }

    // MARK: Waiting

    /// Waits until a condition holds; false when it did not in time. Sysfs tells nobody about changes, so this asks in
    /// short steps.
    /// - Parameter timeout: seconds.
    package func wait(
        _ timeout: Double, until condition: (KernelDevice) throws(SystemError) -> Bool
    ) throws(SystemError) -> Bool {
        try Deadline(seconds: timeout).poll { () throws(SystemError) in try condition(self) }
    }

    /// Whether the driver is done with it: another connect will not find it busy.
    package var isFree: Bool {
        get throws(SystemError) {
            guard try !isConnected, try holders.isEmpty else { return false }
            let inFlight = try inFlight
            return inFlight.reads == 0 && inFlight.writes == 0
        }
    }

    /// Waits until a disconnected device is free; false when it is not after `timeout` seconds, because somebody
    /// still has it open or I/O does not end.
    package func waitUntilFree(_ timeout: Double) throws(SystemError) -> Bool {
        try wait(timeout) { (device) throws(SystemError) in try device.isFree }
    }
}
