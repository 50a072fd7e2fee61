import EventLoop
import Glibc
import Logging

/// What systemd wants to know, by the protocol of sd_notify(3): one datagram to the socket named in NOTIFY_SOCKET.
package enum Readiness {
    /// Does nothing when nobody asked.
    package static func tell(_ state: String, _ logger: Logger) {
        guard let name = getenv("NOTIFY_SOCKET").map({ String(cString: $0) }), !name.isEmpty else { return }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        var path = Array(name.utf8)
        guard path.count < MemoryLayout.size(ofValue: address.sun_path), name.hasPrefix("/") || name.hasPrefix("@")
        else { return logger.warning("cannot tell systemd: NOTIFY_SOCKET is \(name)") }
        // An abstract address begins with a zero byte and ends with its last byte.
        if path[0] == UInt8(ascii: "@") { path[0] = 0 }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path) }
        let offset = MemoryLayout<sockaddr_un>.offset(of: \.sun_path) ?? MemoryLayout<sa_family_t>.size
        let length = socklen_t(offset + path.count)

        let descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { return logger.warning("cannot tell systemd: \(errnoText(errno))") }
        defer { close(descriptor) }
        let bytes = Array(state.utf8)
        let sent = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                sendto(descriptor, bytes, bytes.count, CInt(MSG_NOSIGNAL), $0, length)
            }
        }
        if sent != bytes.count { logger.warning("cannot tell systemd at \(name): \(errnoText(errno))") }
    }
}
