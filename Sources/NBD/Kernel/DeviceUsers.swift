import CLinux
import EventLoop
import Glibc

/// Who keeps a device busy, for people. All of it is a look at a moment; `DeviceClaim` is what makes an unmap safe. A look
/// that fails is an error, not "nobody": only processes that end meanwhile, and those that may not be looked at, are
/// passed over.
package struct DeviceUsers: Sendable {
    /// Most processes that are named.
    static let maximumProcesses = 8

    private let device: KernelDevice
    private let root: String
    /// `nbd0`, `nbd0p1`, ...
    private let nodes: [String]
    /// `43:0`, `43:1`, ...
    private let numbers: Set<String>
    /// Paths the device and its partitions are known under.
    private let paths: Set<String>

    /// - Parameter names: further paths of the device, such as /dev/qbd0.
    package init(_ device: KernelDevice, names: [String] = []) throws(SystemError) {
        self.device = device
        root = device.root
        let numbers = try device.numbers
        nodes = numbers.map(\.name)
        self.numbers = Set(numbers.map(\.number))
        paths = Set(numbers.map { "/dev/\($0.name)" } + names)
    }

    /// All who use it, one phrase each: `mounted at /mnt`, `swap on /dev/nbd0p1`, `held by logical volume vg-data
    /// (dm-3)`, `open in process 812 (fio)`. Empty when nobody is found.
    /// - Parameter except: a process that does not count: the daemon itself.
    package func phrases(except: pid_t = getpid()) throws(SystemError) -> [String] {
        let named = try mounts() + swaps() + holders() + loops()
        // A mount or a holder is the kernel's own opening of the device; processes come on top of it.
        return named + (try processes(except: except))
    }

    /// Another's process: without the right to look there (a daemon that is not root's, or a security module), what it has
    /// open and mounted in a namespace of its own is not seen. The claim of the device sees mounts all the same.
    private static func mayNotLook(_ error: SystemError) -> Bool { error.code == EACCES || error.code == EPERM }

    // MARK: Mounts

    /// In this mount namespace, and in those of other processes as far as they can be read.
    func mounts() throws(SystemError) -> [String] {
        var phrases: [String] = []
        var namespaces: Set<String> = []
        // The first process of a namespace in this order stands for it; what is mounted for us needs no explanation.
        for process in ["self", "1"] + (try processIDs()) {
            let folder = "\(root)/proc/\(process)"
            var table: String?
            do throws(SystemError) {
                let namespace = try TextFile.link("\(folder)/ns/mnt") ?? process
                guard namespaces.insert(namespace).inserted else { continue }
                table = try TextFile.read("\(folder)/mountinfo")
            } catch {
                // EINVAL is that of a process that has ended, and is not waited for yet.
                guard process != "self", Self.mayNotLook(error) || error.code == EINVAL else { throw error }
            }
            guard let text = table else {
                if process == "self" { throw SystemError(code: ENOENT, operation: "read \(folder)/mountinfo") }
                continue
            }
            for mount in Mount.table(text) where numbers.contains(mount.number) || paths.contains(mount.source) {
                let phrase = "mounted at \(mount.mountPoint)"
                guard !phrases.contains(phrase) else { continue }
                let isOurs = process == "self" || process == "1"
                phrases.append(isOurs ? phrase : "\(phrase) for process \(process) (\(command(process)))")
            }
        }
        return phrases
    }

    // MARK: Swap, holders, loop devices

    func swaps() throws(SystemError) -> [String] {
        var phrases: [String] = []
        // A kernel without swap has no such file.
        for swap in Swap.table(try TextFile.read("\(root)/proc/swaps") ?? "") where swap.type == "partition" {
            let isOurs = paths.contains(swap.path) ? true : try isOurs(node: root + swap.path)
            if isOurs { phrases.append("swap on \(swap.path)") }
        }
        return phrases
    }

    func holders() throws(SystemError) -> [String] {
        var phrases: [String] = []
        for holder in try device.holders {
            let folder = "\(root)/sys/block/\(holder)"
            if let name = try TextFile.readLine("\(folder)/dm/name") {
                phrases.append("held by device mapper volume \(name) (\(holder))")
            } else if try TextFile.exists("\(folder)/md") {
                phrases.append("held by RAID array \(holder)")
            } else if try TextFile.exists("\(folder)/bcache") {
                phrases.append("held by cache device \(holder)")
            } else {
                phrases.append("held by \(holder)")
            }
        }
        return phrases
    }

    func loops() throws(SystemError) -> [String] {
        var phrases: [String] = []
        for loop in try TextFile.listAlways("\(root)/sys/block") where loop.hasPrefix("loop") {
            guard let file = try TextFile.readLine("\(root)/sys/block/\(loop)/loop/backing_file"), paths.contains(file)
            else { continue }
            phrases.append("used by loop device \(loop)")
        }
        return phrases
    }

    // MARK: Processes

    func processes(except: pid_t) throws(SystemError) -> [String] {
        var phrases: [String] = []
        var more = 0
        for process in try processIDs() where process != String(except) {
            guard try !isWorker(process), try hasOpen(process) else { continue }
            if phrases.count < Self.maximumProcesses {
                phrases.append("open in process \(process) (\(command(process)))")
            } else {
                more += 1
            }
        }
        return more == 0 ? phrases : phrases + ["open in \(more) more processes"]
    }

    /// Whether a `DeviceProcess` is at work on the device, but this one. A daemon that was killed leaves one behind for
    /// as long as the device's I/O waits: nobody's use of the device, which ends with the device at the latest.
    package var hasWorker: Bool {
        get throws(SystemError) {
            for process in try processIDs() where process != String(getpid()) {
                if try isWorker(process) { return true }
            }
            return false
        }
    }

    private func isWorker(_ process: String) throws(SystemError) -> Bool {
        let folder = "\(root)/proc/\(process)"
        do throws(SystemError) {
            guard try TextFile.readLine("\(folder)/comm") == DeviceProcess.name else { return false }
            let words = try TextFile.read("\(folder)/cmdline")?.split(separator: "\0").map { String($0) } ?? []
            return DeviceProcess.isWorker(words, on: device)
        } catch {
            guard Self.mayNotLook(error) else { throw error }
            return false
        }
    }

    /// Only what stands in some /dev is looked at closer.
    private func hasOpen(_ process: String) throws(SystemError) -> Bool {
        let folder = "\(root)/proc/\(process)/fd"
        do throws(SystemError) {
            for descriptor in try TextFile.list(folder) {
                guard let target = try TextFile.link("\(folder)/\(descriptor)") else { continue }
                if paths.contains(target) { return true }
                if target.contains("dev/"), try isOurs(node: "\(folder)/\(descriptor)") { return true }
            }
        } catch {
            guard Self.mayNotLook(error) else { throw error }
        }
        return false
    }

    /// What it is must be known without asking: a network file system that does not answer would not let this come back.
    private func isOurs(node: String) throws(SystemError) -> Bool {
        var (mode, major, minor): (UInt32, UInt32, UInt32) = (0, 0, 0)
        do throws(SystemError) {
            try retrying("look at \(node)") { qbd_known_type(node, &mode, &major, &minor) }
        } catch {
            // Gone; or on a network file system that is, where there are no devices of this host.
            guard [ENOENT, ESRCH, ENXIO, ENODEV, ESTALE].contains(error.code) else { throw error }
            return false
        }
        return mode & S_IFMT == S_IFBLK && numbers.contains("\(major):\(minor)")
    }

    /// By number.
    private func processIDs() throws(SystemError) -> [String] {
        try TextFile.listAlways("\(root)/proc").compactMap { Int($0) }.sorted().map { String($0) }
    }

    /// For people.
    private func command(_ process: String) -> String {
        do throws(SystemError) { return try TextFile.readLine("\(root)/proc/\(process)/comm") ?? "unknown" } catch {
            return "unknown"
        }
    }
}
