import CLinux
import Glibc

/// Who keeps a device busy, for people. All of it is a look at a moment; `DeviceClaim` is what makes an unmap safe.
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
    package init(_ device: KernelDevice, names: [String] = []) {
        self.device = device
        root = device.root
        let numbers = device.numbers
        nodes = numbers.map(\.name)
        self.numbers = Set(numbers.map(\.number))
        paths = Set(numbers.map { "/dev/\($0.name)" } + names)
    }

    /// All who use it, one phrase each: `mounted at /mnt`, `swap on /dev/nbd0p1`, `held by logical volume vg-data
    /// (dm-3)`, `open in process 812 (fio)`. Empty when nobody is found.
    /// - Parameter except: a process that does not count: the daemon itself.
    package func phrases(except: pid_t = getpid()) -> [String] {
        let named = mounts() + swaps() + holders() + loops()
        // A mount or a holder is the kernel's own opening of the device; processes come on top of it.
        return named + processes(except: except)
    }

    // MARK: Mounts

    /// In this mount namespace, and in those of other processes as far as they can be read.
    func mounts() -> [String] {
        var phrases: [String] = []
        var namespaces: Set<String> = []
        // The first process of a namespace in this order stands for it; what is mounted for us needs no explanation.
        for process in ["self", "1"] + processIDs() {
            let folder = "\(root)/proc/\(process)"
            let namespace = TextFile.link("\(folder)/ns/mnt") ?? process
            guard namespaces.insert(namespace).inserted, let text = TextFile.read("\(folder)/mountinfo") else {
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

    func swaps() -> [String] {
        Swap.table(TextFile.read("\(root)/proc/swaps") ?? "").filter { swap in
            swap.type == "partition" && (paths.contains(swap.path) || isOurs(node: root + swap.path))
        }.map { "swap on \($0.path)" }
    }

    func holders() -> [String] {
        device.holders.map { holder in
            let folder = "\(root)/sys/block/\(holder)"
            if let name = TextFile.readLine("\(folder)/dm/name") {
                return "held by device mapper volume \(name) (\(holder))"
            }
            if TextFile.exists("\(folder)/md") { return "held by RAID array \(holder)" }
            if TextFile.exists("\(folder)/bcache") { return "held by cache device \(holder)" }
            return "held by \(holder)"
        }
    }

    func loops() -> [String] {
        TextFile.list("\(root)/sys/block").filter { $0.hasPrefix("loop") }.compactMap { loop in
            guard let file = TextFile.readLine("\(root)/sys/block/\(loop)/loop/backing_file"), paths.contains(file)
            else {
                return nil
            }
            return "used by loop device \(loop)"
        }
    }

    // MARK: Processes

    func processes(except: pid_t) -> [String] {
        var phrases: [String] = []
        var more = 0
        for process in processIDs() where process != String(except) && !isWorker(process) && hasOpen(process) {
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
    package var hasWorker: Bool { processIDs().contains { $0 != String(getpid()) && isWorker($0) } }

    private func isWorker(_ process: String) -> Bool {
        guard command(process) == DeviceProcess.name else { return false }
        let words = TextFile.read("\(root)/proc/\(process)/cmdline")?.split(separator: "\0").map { String($0) } ?? []
        return DeviceProcess.isWorker(words, on: device)
    }

    /// Only what stands in some /dev is looked at closer.
    private func hasOpen(_ process: String) -> Bool {
        let folder = "\(root)/proc/\(process)/fd"
        return TextFile.list(folder).contains { descriptor in
            guard let target = TextFile.link("\(folder)/\(descriptor)") else { return false }
            return paths.contains(target) || (target.contains("dev/") && isOurs(node: "\(folder)/\(descriptor)"))
        }
    }

    /// What it is must be known without asking: a network file system that does not answer would not let this come back.
    private func isOurs(node: String) -> Bool {
        var (mode, major, minor): (UInt32, UInt32, UInt32) = (0, 0, 0)
        guard qbd_known_type(node, &mode, &major, &minor) == 0, mode & S_IFMT == S_IFBLK else { return false }
        return numbers.contains("\(major):\(minor)")
    }

    /// By number.
    private func processIDs() -> [String] {
        TextFile.list("\(root)/proc").compactMap { Int($0) }.sorted().map { String($0) }
    }

    private func command(_ process: String) -> String {
        TextFile.readLine("\(root)/proc/\(process)/comm") ?? "unknown"
    }
}
