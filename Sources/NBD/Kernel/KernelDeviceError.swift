import EventLoop
import Glibc

/// Something a kernel device needs and cannot have.
package struct KernelDeviceError: Error, Sendable, Equatable, CustomStringConvertible {
    /// The errno, one of the E constants, always positive.
    package let code: Int32
    /// What, which device, why, and what to do; one line.
    package let message: String

    package init(code: Int32, _ message: String) {
        self.code = code
        self.message = message
    }

    package init(_ error: SystemError) {
        code = error.code
        message = error.description
    }

    package var description: String { message }
}
