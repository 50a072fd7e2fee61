import EventLoop
import Glibc

/// The kernel's module nbd. Calls may block: never on a loop.
package struct KernelDriver: Sendable {
    /// Partitions of a device the kernel has numbers for.
    static let maximumPartitions = 31
    /// Devices made when the module is loaded; more come as they are connected.
    static let devices = 16
    /// Seconds modprobe may take.
    static let loadTimeout = 30.0
    private static let modprobe = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"]

    private let root: String
    private let programs: [String]

    package init() { self.init(root: "", programs: Self.modprobe) }

    /// For tests: another place for /sys, and programs to load the module with, of which the first that is there runs.
    package init(root: String, programs: [String]) {
        self.root = root
        self.programs = programs
    }

    /// Whether the driver is loaded or built in. ENOENT where /sys is not mounted, which says nothing of drivers.
    package var isLoaded: Bool {
        get throws(SystemError) {
            if try TextFile.exists("\(root)/sys/module/nbd") { return true }
            guard try TextFile.exists("\(root)/sys/module") else {
                throw SystemError(code: ENOENT, operation: "look for the nbd driver in \(root)/sys/module")
            }
            return false
        }
    }

    /// Loads the driver when it is missing. ENODEV, with what is missing and what to do, when it cannot be.
    package func load() throws(KernelDeviceError) {
        let reason: String
        do throws(SystemError) {
            if try isLoaded { return }
            reason = runModprobe()
            if try isLoaded { return }
        } catch { throw KernelDeviceError(error) }
        throw KernelDeviceError(code: ENODEV, "this kernel (\(kernelRelease())) has no nbd driver: \(reason)")
    }

    /// Why the driver is not there after all.
    private func runModprobe() -> String {
        let onHost = "in a container, load it on the host: modprobe nbd"
        guard let program = programs.first(where: { access($0, X_OK) == 0 }) else {
            return "the program modprobe is missing (Debian: package kmod); \(onHost)"
        }
        let result: ChildProcess.Result
        do throws(SystemError) {
            result = try ChildProcess.run(
                program, ["nbd", "max_part=\(Self.maximumPartitions)", "nbds_max=\(Self.devices)"],
                timeout: Self.loadTimeout)
        } catch { return "\(error); \(onHost)" }
        if result.timedOut { return "\(program) did not end within \(Int(Self.loadTimeout)) s" }
        let said = result.errorOutput.replacing("\n", with: "; ").replacing("modprobe: FATAL: ", with: "")
        if said.contains("not permitted") || said.contains("ermission denied") {
            return "\(said): loading it needs CAP_SYS_MODULE (run the daemon as root); \(onHost)"
        }
        if said.contains("not found") {
            return "\(said): the kernel's module package is missing (Debian: linux-image-amd64, Ubuntu:"
                + " linux-modules-extra-\(kernelRelease())); \(onHost)"
        }
        if result.status != 0 { return said.isEmpty ? "\(program) nbd failed; \(onHost)" : "\(said); \(onHost)" }
        return "\(program) nbd loaded nothing; is it blacklisted in /etc/modprobe.d?"
    }
}
