import Glibc

/// What a socket holds of what is sent, until it is received.
enum SendBuffer {
    /// Makes it at least so large: beyond the limit of net.core.wmem_max as root, up to it otherwise.
    /// - Parameter bytes: the kernel counts its own needs too, and makes it twice as large for them.
    static func enlarge(_ descriptor: Int32, to bytes: Int32) {
        var size: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        guard getsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &size, &length) == 0, size / 2 < bytes else { return }
        size = bytes
        if setsockopt(descriptor, SOL_SOCKET, SO_SNDBUFFORCE, &size, length) != 0 {
            setsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &size, length)
        }
    }
}
