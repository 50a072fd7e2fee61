import CLinux
import EventLoop
import Glibc

/// Prepares the process for its place in the write-back path: when memory is short, the kernel writes dirty pages to our
/// devices to free some, and must not wait for memory inside the process that has to take these pages.
package enum MemoryPressure {
    /// Capabilities of linux/capability.h, as bits of CapEff in /proc/PID/status.
    private static let CAP_IPC_LOCK: UInt64 = 1 << 14
    private static let CAP_SYS_RESOURCE: UInt64 = 1 << 24

    /// Call once, on the main thread, before any other thread starts: threads take over what the one that starts them
    /// has.
    /// - Returns: one line for each thing that is missing, with what it means.
    package static func prepare() -> [String] {
        let needs = "; needs CAP_SYS_RESOURCE (run as root, without a capability bounding set)"
        var warnings: [String] = []
        if let reason = lockMemory() {
            warnings.append(
                "memory is not locked: \(reason); under memory pressure parts of the daemon may be swapped out, and a device"
                    + " it serves may stall while they are read back")
        }
        if qbd_set_io_flusher() != 0 {
            warnings.append(
                "PR_SET_IO_FLUSHER: \(errnoText(errno))\(needs); under memory pressure the daemon may wait for pages that"
                    + " only it can write, and its devices would hang")
        }
        do throws(SystemError) {
            try TextFile.write("-1000", to: "/proc/self/oom_score_adj")
        } catch {
            warnings.append(
                "\(error)\(needs); the kernel may end the daemon when memory runs out, and its devices wait until it is"
                    + " back")
        }
        return warnings
    }

    /// Locks what is in memory now, and each page from its first use on.
    /// - Returns: why not.
    private static func lockMemory() -> String? {
        // What malloc keeps for later would be locked, too. Its own threshold goes up to 32 MiB with what is freed.
        _ = qbd_set_malloc_mmap_threshold(256 << 10)
        var unlimited = rlimit(rlim_cur: rlim_t.max, rlim_max: rlim_t.max)
        let raised = setrlimit(__rlimit_resource_t(__RLIMIT_MEMLOCK.rawValue), &unlimited) == 0
        // With a limit, mapping memory would fail once it is used up, which is worse than not to lock.
        do throws(SystemError) {
            let mayLock = try capabilities() & CAP_IPC_LOCK != 0
            guard raised || mayLock else {
                return "RLIMIT_MEMLOCK cannot be raised (needs CAP_SYS_RESOURCE or CAP_IPC_LOCK)"
            }
        } catch { return "\(error)" }
        guard mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0 else { return "mlockall: \(errnoText(errno))" }
        return nil
    }

    private static func capabilities() throws(SystemError) -> UInt64 {
        let lines = try TextFile.read("/proc/self/status")?.split(separator: "\n") ?? []
        guard let line = lines.first(where: { $0.hasPrefix("CapEff:") }) else { return 0 }
        return UInt64(line.dropFirst(7).drop { $0 == "\t" || $0 == " " }, radix: 16) ?? 0
    }
}
