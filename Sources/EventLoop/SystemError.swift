import CLinux
import Glibc

/// A failed system call: its errno and what was tried.
package struct SystemError: Error, Sendable, CustomStringConvertible {
    /// The errno, one of the E constants, always positive.
    package let code: Int32
    /// What was tried, for people: "bind /run/qbd/nbd.sock".
    package let operation: String
    /// What says more than the errno's text; nil for nothing.
    private let reason: String?

    package init(code: Int32, operation: String, reason: String? = nil) {
        self.code = code
        self.operation = operation
        self.reason = reason
    }

    package var description: String { "\(operation): \(reason ?? errnoText(code))" }
}

/// The C library's text for an errno, on any thread.
package func errnoText(_ code: Int32) -> String {
    var buffer = [CChar](repeating: 0, count: 128)
    qbd_strerror(code, &buffer, buffer.count)
    return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
}

/// Repeats a system call while it is interrupted; throws its errno. EBADF and EFAULT are bugs of ours, never of a
/// peer, and stop the process where the state is still known.
@inline(__always)
@discardableResult
package func retrying<Value: FixedWidthInteger & SignedNumeric>(
    _ operation: @autoclosure () -> String, _ body: () -> Value
) throws(SystemError) -> Value {
    while true {
        let value = body()
        if value != -1 { return value }
        let code = errno
        if code == EINTR { continue }
        precondition(code != EBADF && code != EFAULT, "\(operation()): \(errnoText(code))")
        throw SystemError(code: code, operation: operation())
    }
}

/// Repeats a system call without which its thread cannot go on, a millisecond apart, until it returns 0. The kernel needs
/// nothing for it that it could be short of; EBADF, EFAULT, EINVAL and ENOENT are bugs of ours, as for `retrying`, and ENOSYS is a kernel
/// that is too old.
@inline(__always)
func insisting(_ operation: @autoclosure () -> String, _ body: () -> Int32) {
    while body() != 0 { pause(errno, operation()) }
}

@inline(never)
private func pause(_ code: Int32, _ operation: @autoclosure () -> String) {
    precondition(![EBADF, EFAULT, EINVAL, ENOENT, ENOSYS].contains(code), "\(operation()): \(errnoText(code))")
    var time = timespec(tv_sec: 0, tv_nsec: 1_000_000)
    clock_nanosleep(CLOCK_MONOTONIC, 0, &time, nil)
}

/// Adds one to an eventfd. That it is full already is as good: who reads it wakes up.
func signalEvent(_ descriptor: Int32) {
    var one: UInt64 = 1
    insisting("write to an eventfd") { write(descriptor, &one, 8) == 8 || errno == EAGAIN ? 0 : -1 }
}

/// Nanoseconds of CLOCK_MONOTONIC.
@inline(__always)
package func monotonicNanoseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(truncatingIfNeeded: time.tv_sec) &* 1_000_000_000 &+ UInt64(truncatingIfNeeded: time.tv_nsec)
}

/// The names in a folder, as the kernel gives them, without `.` and `..`; those that are not UTF-8 are left out.
/// - Parameters:
///   - stream: of the folder, read to its end and closed.
///   - folder: its path, for the error's text.
package func readNames(_ stream: OpaquePointer, of folder: String) throws(SystemError) -> [String] {
    defer { closedir(stream) }
    var names: [String] = []
    while true {
        // The end and an error look the same but for this.
        errno = 0
        guard let entry = readdir(stream) else {
            guard errno == 0 else { throw SystemError(code: errno, operation: "read \(folder)") }
            return names
        }
        let name = withUnsafePointer(to: &entry.pointee.d_name) { name in
            name.withMemoryRebound(to: CChar.self, capacity: 256) { String(validatingCString: $0) }
        }
        if let name, name != ".", name != ".." { names.append(name) }
    }
}
