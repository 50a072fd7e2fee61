import CLinux
import EventLoop
import Glibc

/// The names a device is known by: `/dev/qbdN` with its partitions `/dev/qbdNpM`, and `/dev/qbd/pool/volume`. All of them
/// are symbolic links to the kernel's own nodes. All calls may block: never on a loop.
///
/// The daemon makes and removes them itself, everywhere. Where udev runs, its rules (60-qbd.rules) say the same links, so
/// that systemd knows of them, and keep them when udev looks at the device again; then this waits until udev has handled
/// a change before it looks at the links, so that udev does not undo what was just done.
package struct DeviceNames: Sendable {
    private let root: String
    private let udev: Udev
    /// Seconds udev gets to handle an event.
    private let udevTimeout: Double
    /// Seconds of it after which the event of a new device is taken for one that came too early.
    private let udevPatience: Double

    package init(root: String = "", udevTimeout: Double = 10, udevPatience: Double = 0.5) {
        self.root = root
        self.udevTimeout = udevTimeout
        self.udevPatience = min(udevPatience, udevTimeout)
        udev = Udev(root: root)
    }

    /// A link and what it says, both below /dev.
    struct Link: Equatable {
        var path: String
        var target: String
    }

    static func links(_ device: KernelDevice, _ identifier: DeviceIdentifier) throws(SystemError) -> [Link] {
        let disk = "qbd\(identifier.deviceID)"
        let partitions = try device.partitions.map { name in
            Link(path: "\(disk)p\(name.dropFirst(device.name.utf8.count + 1))", target: name)
        }
        var links = [Link(path: disk, target: device.name)]
        if hasName(identifier) { links.append(Link(path: "qbd/\(identifier.volume)", target: "../../\(device.name)")) }
        return links + partitions
    }

    /// Whether there can be a file of the volume's name: a snapshot's may be too long for that.
    static func hasName(_ identifier: DeviceIdentifier) -> Bool {
        identifier.volume.split(separator: "/").allSatisfy { $0.utf8.count <= Int(NAME_MAX) }
    }

    private static func names(of identifier: DeviceIdentifier) -> [String] {
        ["qbd\(identifier.deviceID)"] + (hasName(identifier) ? ["qbd/\(identifier.volume)"] : [])
    }

    /// The paths under which users know the device.
    package static func paths(
        _ device: KernelDevice, _ identifier: DeviceIdentifier
    ) throws(SystemError) -> [String] {
        try links(device, identifier).map { "/dev/\($0.path)" }
    }

    /// Makes the names of a device that is connected and whose partitions were scanned. Replaces links of ours that are
    /// left from before. ENODEV when the device is another one's now.
    /// - Parameter asksUdev: udev is asked to look again if it does not know the names. Once for a device: it is told to
    ///   everybody as a change.
    /// - Returns: one line for each thing that is not as it should be, though the names are there.
    package func make(
        _ device: KernelDevice, _ identifier: DeviceIdentifier, asksUdev: Bool = false
    ) throws(SystemError) -> [String] {
        let links = try Self.links(device, identifier)
        var remarks: [String] = []
        if try udev.knowsOurRules {
            let disk = links.filter { !$0.path.hasPrefix("qbd\(identifier.deviceID)p") }.map(\.path)
            remarks = try awaitUdev(device, asks: asksUdev) { () throws(SystemError) in
                let known = try udev.links(of: device)
                return disk.allSatisfy(known.contains)
            }
        }
        try checkOthers(device, identifier)
        // Work begun for a mapping that is over must not name what has come in its place.
        guard try device.identifier == identifier else {
            throw SystemError(
                code: ENODEV, operation: "make the names of \(device.path) (it is not that of \(identifier) any more)")
        }
        try makeNodes(device)
        for link in links { try make(link) }
        if !Self.hasName(identifier) {
            remarks.append(
                "\(identifier.volume) has no name below /dev/qbd, where names have at most \(NAME_MAX) bytes: use"
                    + " /dev/qbd\(identifier.deviceID)")
        }
        for stale in try partitionLinks(of: identifier) where !links.contains(where: { $0.path == stale }) {
            try remove(stale)
        }
        return remarks
    }

    /// The kernel tells of a new device a moment before it sets the attribute that our rules look at, and not again.
    private func awaitUdev(
        _ device: KernelDevice, asks: Bool, _ hasNamed: () throws(SystemError) -> Bool
    ) throws(SystemError) -> [String] {
        let late = Deadline(seconds: udevTimeout)
        if try Deadline(seconds: udevPatience).poll(hasNamed) { return [] }
        var refusal = ""
        if asks {
            do throws(SystemError) { try TextFile.write("change", to: "\(device.folder)/uevent") } catch {
                refusal = "; it could not be asked to look again: \(error)"
            }
        }
        return try late.poll(hasNamed)
            ? [] : ["udev did not name \(device.path) within \(Int(udevTimeout)) s\(refusal)"]
    }

    /// EEXIST when a name is that of a device of another daemon on this host.
    private func checkOthers(_ device: KernelDevice, _ identifier: DeviceIdentifier) throws(SystemError) {
        for name in Self.names(of: identifier) {
            guard let disk = Self.node(of: try TextFile.link(path(name)))?.disk, disk != device.name,
                let index = UInt32(disk.dropFirst(3)),
                let other = try KernelDevice(index: index, root: root).identifier,
                other.deviceID == identifier.deviceID || other.volume == identifier.volume
            else { continue }
            throw SystemError(
                code: EEXIST, operation: "make the link \(path(name)) (it leads to /dev/\(disk), which is \(other))")
        }
    }

    /// Removes the names of a device, connected or not any more. What does not point to it stays.
    /// - Returns: one line for each thing that is not as it should be.
    package func remove(_ device: KernelDevice, _ identifier: DeviceIdentifier) -> [String] {
        var remarks: [String] = []
        // An event that udev still has to handle may bring the links back; the last one, of the disconnect, does not.
        do throws(SystemError) {
            if try udev.knowsOurRules, try !device.isConnected {
                let done = try Deadline(seconds: udevTimeout).poll { () throws(SystemError) in
                    try udev.links(of: device).isEmpty
                }
                if !done { remarks.append("udev did not forget \(device.path) within \(Int(udevTimeout)) s") }
            }
        } catch { remarks.append("\(error)") }
        return remarks + removeNames(of: identifier) { (disk) throws(SystemError) in disk == device.name }
    }

    /// Removes the names of a device that nobody disconnected here, unless what they lead to is a device of ours again.
    /// - Returns: one line for each thing that is not as it should be.
    package func remove(_ identifier: DeviceIdentifier) -> [String] {
        removeNames(of: identifier) { (disk) throws(SystemError) in
            guard let index = UInt32(disk.dropFirst(3)) else { return false }
            return try KernelDevice(index: index, root: root).identifier == nil
        }
    }

    /// - Parameter isStale: told the disk that a name leads to.
    private func removeNames(
        of identifier: DeviceIdentifier, where isStale: (String) throws(SystemError) -> Bool
    ) -> [String] {
        var remarks: [String] = []
        var names = Self.names(of: identifier)
        do throws(SystemError) { names += try partitionLinks(of: identifier) } catch { remarks.append("\(error)") }
        for name in names {
            do throws(SystemError) {
                guard let disk = Self.node(of: try TextFile.link(path(name)))?.disk, try isStale(disk) else { continue }
                try remove(name)
            } catch { remarks.append("\(error); the name \(path(name)) is left") }
        }
        return remarks
    }

    private func path(_ name: String) -> String { "\(root)/dev/\(name)" }

    /// What is there of `qbdNpM`.
    private func partitionLinks(of identifier: DeviceIdentifier) throws(SystemError) -> [String] {
        let prefix = "qbd\(identifier.deviceID)p"
        var links: [String] = []
        for name in try TextFile.list("\(root)/dev") where name.hasPrefix(prefix) {
            guard UInt32(name.dropFirst(prefix.utf8.count)) != nil, Self.node(of: try TextFile.link(path(name))) != nil
            else { continue }
            links.append(name)
        }
        return links
    }

    /// The node that a link as we make them leads to, and its disk; nil for any other link, which is not ours.
    static func node(of target: String?) -> (node: String, disk: String)? {
        guard var name = target?[...] else { return nil }
        if name.hasPrefix("../../") { name = name.dropFirst(6) }
        let number = name.dropFirst(3).prefix { $0.isASCII && $0.isNumber }
        let rest = name.dropFirst(3 + number.count)
        guard name.hasPrefix("nbd"), !number.isEmpty,
            rest.isEmpty || (rest.hasPrefix("p") && UInt32(rest.dropFirst()) != nil)
        else { return nil }
        return (String(name), "nbd\(number)")
    }

    // MARK: Links

    private func make(_ link: Link) throws(SystemError) {
        let path = path(link.path)
        // Another's rmdir of an empty folder may come between making it and using it, and another's name in place of none.
        for attempt in 1... {
            try makeFolders(link.path)
            if symlink(link.target, path) == 0 { return }
            guard errno == EEXIST || (errno == ENOENT && attempt < 100) else {
                throw SystemError(code: errno, operation: "make the link \(path)")
            }
            if errno == EEXIST, try replace(path, link.target) { return }
        }
    }

    /// Replaces what has the name. EEXIST when that is not ours.
    /// - Returns: false when nothing has it any more.
    private func replace(_ path: String, _ target: String) throws(SystemError) -> Bool {
        guard let now = try TextFile.link(path) else {
            if try !isThere(path) { return false }
            throw SystemError(code: EEXIST, operation: "make the link \(path) (what is there is not ours)")
        }
        if now == target { return true }
        guard Self.node(of: now) != nil else {
            throw SystemError(code: EEXIST, operation: "make the link \(path) (what is there is not ours)")
        }
        let temporary = "\(path).qbd~"
        unlink(temporary)
        try retrying("make the link \(temporary)") { symlink(target, temporary) }
        try retrying("make the link \(path)") { rename(temporary, path) }
        return true
    }

    private func isThere(_ path: String) throws(SystemError) -> Bool {
        var status = stat()
        do throws(SystemError) { try retrying("look at \(path)") { lstat(path, &status) } } catch {
            guard error.code == ENOENT else { throw error }
            return false
        }
        return true
    }

    private func makeFolders(_ name: String) throws(SystemError) {
        var folder = "\(root)/dev"
        for part in name.split(separator: "/").dropLast() {
            folder += "/\(part)"
            if mkdir(folder, 0o755) != 0, errno != EEXIST {
                throw SystemError(code: errno, operation: "make folder \(folder)")
            }
        }
    }

    /// Removes a link, and its folders up to /dev when they are empty.
    private func remove(_ name: String) throws(SystemError) {
        do throws(SystemError) { try retrying("remove \(path(name))") { unlink(path(name)) } } catch {
            guard error.code == ENOENT else { throw error }
        }
        var parts = name.split(separator: "/").dropLast()
        while !parts.isEmpty, rmdir(path(parts.joined(separator: "/"))) == 0 { parts = parts.dropLast() }
    }

    // MARK: Nodes

    /// Makes the kernel's own nodes where nobody else does: a container's /dev is often a folder like any other. Those
    /// of partitions once they are known.
    package func makeNodes(_ device: KernelDevice) throws(SystemError) {
        for (name, number) in try device.numbers { try makeNode(name, number) }
    }

    private func makeNode(_ name: String, _ number: String) throws(SystemError) {
        let parts = number.split(separator: ":").compactMap { UInt32($0) }
        guard parts.count == 2 else { return }
        let path = path(name)
        if try isThere(path) { return }
        if mknod(path, S_IFBLK | 0o660, qbd_makedev(parts[0], parts[1])) == 0 || errno == EEXIST { return }
        throw SystemError(code: errno, operation: "make the device node \(path)")
    }
}

/// What can be seen of udev from outside.
struct Udev: Sendable {
    private static let ruleFolders = [
        "/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d",
        "/lib/udev/rules.d",
    ]
    static let rules = "60-qbd.rules"

    let root: String

    /// Whether udev runs and has our rules.
    var knowsOurRules: Bool {
        get throws(SystemError) {
            guard try TextFile.exists("\(root)/run/udev/control") else { return false }
            for folder in Self.ruleFolders where try TextFile.exists("\(root)\(folder)/\(Self.rules)") { return true }
            return false
        }
    }

    /// The links, below /dev, that udev keeps by our rules for a disk: those of the last event it has handled. Its
    /// database says them as lines `S:name` of the file bMAJOR:MINOR.
    func links(of device: KernelDevice) throws(SystemError) -> [String] {
        guard let number = try TextFile.readLine("\(device.folder)/dev"),
            let text = try TextFile.read("\(root)/run/udev/data/b\(number)")
        else { return [] }
        return text.split(separator: "\n").filter { $0.hasPrefix("S:qbd") }.map { String($0.dropFirst(2)) }
    }
}
