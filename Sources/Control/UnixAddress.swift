import Glibc

/// The address of a Unix socket in the file system.
struct UnixAddress {
    private var storage = sockaddr_un()

    /// Linux takes a path of at most 107 bytes.
    static let maximumPathLength = MemoryLayout.size(ofValue: sockaddr_un().sun_path) - 1

    /// - Throws: code 22 when the path is empty or too long.
    init(_ path: String) throws(ControlError) {
        guard !path.isEmpty else { throw .invalid("the socket's path is empty") }
        guard path.utf8.count <= Self.maximumPathLength, !path.utf8.contains(0) else {
            throw .invalid("the socket's path \(path) is longer than \(Self.maximumPathLength) bytes")
        }
        storage.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &storage.sun_path) { room in
            room.copyBytes(from: path.utf8)
        }
    }

    func withPointer<Result>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Result) -> Result {
        withUnsafePointer(to: storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
    }
}
