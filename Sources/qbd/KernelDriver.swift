import Configuration
import Control
import Glibc

/// The kernel's NBD client, which makes a block device of an export.
enum KernelDriver {
    private static let module = "/sys/module/nbd"
    private static let device = "/dev/nbd0"

    /// Why a volume cannot become a block device: code 19 (ENODEV) when the kernel has no driver for it.
    static func refusal(for name: VolumeName) -> ControlError {
        guard access(module, F_OK) == 0 || access(device, F_OK) == 0 else {
            return ControlError(
                ENODEV,
                "this kernel has no nbd driver (neither \(module) nor \(device)), so \(name) cannot become a block"
                    + " device: load it with 'modprobe nbd', or add --export to serve the volume over NBD without one")
        }
        return Feature.kernelDevice.comesLater
    }
}
