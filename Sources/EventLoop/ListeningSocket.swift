import CLinux
import Glibc

/// Sockets to listen on. All calls may block (name resolution); none on a loop.
package enum ListeningSocket {
    private static let backlog: Int32 = 512

    /// Listens on a Unix socket with mode 0600. Its folder is made when missing, a socket nobody listens on is
    /// replaced.
    package static func unix(path: String) throws(SystemError) -> Int32 {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let capacity = MemoryLayout.size(ofValue: address.sun_path)
        guard path.utf8.count < capacity else {
            throw SystemError(
                code: ENAMETOOLONG, operation: "listen on \(path) (a socket's path has at most \(capacity - 1) bytes)")
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        if let slash = path.lastIndex(of: "/"), slash != path.startIndex {
            let folder = String(path[..<slash])
            if mkdir(folder, 0o755) != 0, errno != EEXIST {
                throw SystemError(code: errno, operation: "make folder \(folder)")
            }
        }
        let descriptor = try retrying("socket") {
            socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        }
        do {
            try removeStale(path, &address)
            try withAddress(&address) { (pointer, length) throws(SystemError) in
                _ = try retrying("bind \(path)") { bind(descriptor, pointer, length) }
            }
            // Before listen nobody can connect, so there is no moment at which others could.
            try retrying("chmod \(path)") { chmod(path, 0o600) }
            try retrying("listen on \(path)") { listen(descriptor, backlog) }
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        return descriptor
    }

    private static func removeStale(_ path: String, _ address: inout sockaddr_un) throws(SystemError) {
        var status = stat()
        do throws(SystemError) { try retrying("look at \(path)") { lstat(path, &status) } } catch {
            guard error.code == ENOENT else { throw error }
            return
        }
        guard status.st_mode & S_IFMT == S_IFSOCK else {
            throw SystemError(code: EEXIST, operation: "listen on \(path) (it is there and is no socket)")
        }
        // One that is busy is not waited for: EAGAIN.
        let probe = try retrying("socket") {
            socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        }
        defer { Glibc.close(probe) }
        let answered = withAddress(&address) { pointer, length in connect(probe, pointer, length) == 0 }
        let code = errno
        if answered || code == EAGAIN {
            throw SystemError(code: EADDRINUSE, operation: "listen on \(path) (another daemon answers there)")
        }
        guard code == ECONNREFUSED else {
            throw SystemError(code: code, operation: "tell whether somebody listens on \(path)")
        }
        try retrying("remove \(path)") { unlink(path) }
    }

    /// Has an accepted TCP client answered at once, and its end noticed when its host says nothing more. What the kernel
    /// does not take of it is not needed to be right.
    /// - Parameters:
    ///   - idle: seconds without a sign of the client after which it is asked for one.
    ///   - interval: seconds between five more questions.
    ///   - limit: milliseconds without an acknowledgement of what was sent, or with no room for more at the client's; nil
    ///     where a client may be stopped for any time.
    package static func watch(_ client: Int32, idle: Int32, interval: Int32, limit: Int32? = nil) {
        func set(_ level: Int32, _ option: Int32, _ value: Int32) {
            var value = value
            setsockopt(client, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
        }
        let tcp = Int32(IPPROTO_TCP)
        set(tcp, TCP_NODELAY, 1)
        set(SOL_SOCKET, SO_KEEPALIVE, 1)
        set(tcp, TCP_KEEPIDLE, idle)
        set(tcp, TCP_KEEPINTVL, interval)
        set(tcp, TCP_KEEPCNT, 5)
        if let limit { set(tcp, TCP_USER_TIMEOUT, limit) }
    }

    private static func withAddress<Value, Failure: Error>(
        _ address: inout sockaddr_un, _ body: (__CONST_SOCKADDR_ARG, socklen_t) throws(Failure) -> Value
    ) throws(Failure) -> Value {
        try withUnsafeMutablePointer(to: &address) { (pointer) throws(Failure) -> Value in
            let raw = UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: sockaddr.self)
            return try body(__CONST_SOCKADDR_ARG(__sockaddr__: raw), socklen_t(MemoryLayout<sockaddr_un>.size))
        }
    }

    /// Listens on a TCP address.
    /// - Parameter host: a name, an IPv4 or an IPv6 address without brackets; empty is every address.
    package static func tcp(host: String, port: UInt16) throws(SystemError) -> Int32 {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV
        var list: UnsafeMutablePointer<addrinfo>?
        let code = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &list)
        guard code == 0, let first = list else {
            let text = gai_strerror(code).map { String(cString: $0) } ?? "error \(code)"
            throw SystemError(code: EADDRNOTAVAIL, operation: "resolve \(host)", reason: text)
        }
        defer { freeaddrinfo(list) }
        let info = first.pointee
        let descriptor = try retrying("socket") {
            socket(info.ai_family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        }
        do {
            var one: Int32 = 1
            let size = socklen_t(MemoryLayout<Int32>.size)
            try retrying("SO_REUSEADDR") { setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &one, size) }
            try retrying("bind \(host):\(port)") {
                bind(descriptor, __CONST_SOCKADDR_ARG(__sockaddr__: info.ai_addr), info.ai_addrlen)
            }
            try retrying("listen on \(host):\(port)") { listen(descriptor, backlog) }
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        return descriptor
    }

    /// The port of a TCP socket that listens: the one the kernel chose where 0 was asked for.
    package static func port(of descriptor: Int32) throws(SystemError) -> UInt16 {
        var address = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        try withUnsafeMutablePointer(to: &address) { (pointer) throws(SystemError) in
            let raw = UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: sockaddr.self)
            _ = try retrying("getsockname") { getsockname(descriptor, __SOCKADDR_ARG(__sockaddr__: raw), &length) }
        }
        // At the same place in the addresses of both families.
        return withUnsafeBytes(of: address) { UInt16(bigEndian: $0.load(fromByteOffset: 2, as: UInt16.self)) }
    }
}
