import CLinux
import Glibc

/// Who asks on the control socket: what the kernel noted of the process when it connected.
package struct ControlCaller: Sendable {
    /// The daemon itself, for what its own command line and its state name.
    package static let daemon = ControlCaller(user: 0, groups: [])

    /// The effective user.
    package let user: uid_t
    /// The effective group and the supplementary ones.
    package let groups: Set<gid_t>

    package init(user: uid_t, groups: Set<gid_t>) {
        self.user = user
        self.groups = groups
    }

    /// - Parameter socket: a connected Unix socket.
    /// - Throws: the errno as a code, when the kernel does not say who is at the other end.
    init(atOtherEndOf socket: CInt) throws(ControlError) {
        var peer = ucred()
        var size = socklen_t(MemoryLayout<ucred>.size)
        guard getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 else {
            throw ControlError(errno, "qbdd cannot tell who asks: \(String(cString: strerror(errno)))")
        }
        // At most NGROUPS_MAX, 65536; the kernel says how many bytes when these are too few.
        var supplementary = [gid_t](repeating: 0, count: 32)
        while true {
            size = socklen_t(supplementary.count * MemoryLayout<gid_t>.size)
            if getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, &supplementary, &size) == 0 { break }
            let count = Int(size) / MemoryLayout<gid_t>.size
            guard errno == ERANGE, count > supplementary.count else {
                throw ControlError(
                    errno, "qbdd cannot tell the groups of who asks: \(String(cString: strerror(errno)))")
            }
            supplementary = [gid_t](repeating: 0, count: count)
        }
        user = peer.uid
        groups = Set(supplementary.prefix(Int(size) / MemoryLayout<gid_t>.size)).union([peer.gid])
    }

    /// Whether the mode of a file lets this caller read it. The owner counts as one who may: the mode is his to change.
    package func mayRead(_ file: stat) -> Bool {
        if user == 0 || user == file.st_uid { return true }
        return file.st_mode & (groups.contains(file.st_gid) ? S_IRGRP : S_IROTH) != 0
    }
}
