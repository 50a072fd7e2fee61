import Glibc

/// Why a command failed, on either side of the control socket.
///
/// Its code becomes the exit status of `qbd`.
package struct ControlError: Error, Equatable, Sendable, Codable {
    /// An errno of Linux: 25 not mapped, 16 busy, 2 no such volume, 110 timed out, 111 the daemon is not running, 1 no
    /// permission, 22 invalid argument, 95 comes in a later version.
    package let code: Int32
    /// One sentence for people: what, which volume, why, and what to do.
    package let message: String

    /// - Parameters:
    ///   - code: the errno; it is the exit status of `qbd`, so 1 to 125.
    ///   - message: one sentence; line breaks and control characters in it are rendered as blanks.
    package init(_ code: Int32, _ message: String) {
        self.code = code
        self.message = message
    }

    /// The line that goes to stderr and to the log, as the original wrote it, with the sentence for people behind it:
    /// `failed to ioctl /dev/qbdctl with QBD_IOC_UNMAP_VOLUME:25: <sentence>`.
    package func line(for command: Command) -> String {
        let sentence = String(
            String.UnicodeScalarView(
                message.unicodeScalars.map { $0.properties.generalCategory == .control ? " " : $0 }))
        return "failed to ioctl /dev/qbdctl with \(command.ioctlName):\(code): \(sentence)"
    }
}

extension ControlError {
    package static func notMapped(_ message: String) -> ControlError { ControlError(ENOTTY, message) }
    package static func invalid(_ message: String) -> ControlError { ControlError(EINVAL, message) }
    package static func comesLater(_ subject: String) -> ControlError {
        ControlError(
            EOPNOTSUPP,
            "\(subject) comes in a later version of qbd; this is \(ProductVersion.string)")
    }
}
