import Glibc

/// A path that is this process's to listen at, before it does: its lock is taken, and nobody else answers there.
package struct ControlPath: ~Copyable {
    package let path: String
    fileprivate let lock: LockFile

    /// Makes the folders to the path where they are missing, takes the path's lock, and checks that no other daemon
    /// answers there and nothing but a socket is in the way.
    ///
    /// - Throws: code 98 when another daemon answers at `path`, 17 when something else than a socket is there, 22 when
    ///   it is too long.
    package static func reserve(_ path: String) throws(ControlError) -> ControlPath {
        let address = try UnixAddress(path)
        _ = try UnixAddress(ControlSocket.draft(of: path))
        try ControlSocket.makeFolders(to: path)
        let lock = try LockFile(path: path + ".lock", guarding: path)
        try ControlSocket.refuseLivingOwner(path, address)
        return ControlPath(path: path, lock: lock)
    }

    private init(path: String, lock: consuming LockFile) {
        self.path = path
        self.lock = lock
    }

    fileprivate consuming func takeLock() -> LockFile { lock }
}

/// The socket file the daemon listens at: made so that there is never a moment at which it is there with wrong rights,
/// and never two daemons behind one path.
struct ControlSocket: ~Copyable {
    /// Listening; whoever takes it closes it.
    let descriptor: CInt
    let path: String
    private let lock: LockFile
    private let identity: FileIdentity

    /// How many connections the kernel keeps waiting while the daemon is busy.
    private static let backlog: CInt = 1024

    /// Puts a listening socket in place of what a dead daemon left behind. The socket has mode 0660; with root's rights
    /// it belongs to root and to the group `qbd`, if there is one.
    static func listen(at reserved: consuming ControlPath) throws(ControlError) -> ControlSocket {
        let path = reserved.path
        let draft = draft(of: path)
        let draftAddress = try UnixAddress(draft)
        let descriptor = socket(AF_UNIX, socketKind, 0)
        guard descriptor >= 0 else { throw .system("cannot make a socket for \(path)") }
        do throws(ControlError) {
            unlink(draft)
            guard draftAddress.withPointer({ bind(descriptor, $0, $1) }) == 0 else {
                throw .system("cannot make the socket \(path)")
            }
            let identity = try publish(descriptor, draft: draft, path: path)
            return ControlSocket(descriptor: descriptor, path: path, lock: reserved.takeLock(), identity: identity)
        } catch {
            unlink(draft)
            Glibc.close(descriptor)
            throw error
        }
    }

    /// The socket is made beside its path and moved there when it is ready.
    fileprivate static func draft(of path: String) -> String { path + "~" }

    private init(descriptor: CInt, path: String, lock: consuming LockFile, identity: FileIdentity) {
        self.descriptor = descriptor
        self.path = path
        self.lock = lock
        self.identity = identity
    }

    private static let socketKind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)

    /// Removes the socket's file, if it still is the one made here. Does not close the descriptor.
    consuming func remove() {
        // What somebody else has put there, or what cannot be told, stays.
        if let named = try? FileIdentity(path: path), named == identity { unlink(path) }
    }

    private static func publish(
        _ descriptor: CInt, draft: String, path: String
    ) throws(ControlError) -> FileIdentity {
        guard chmod(draft, 0o660) == 0 else { throw .system("cannot set the mode of \(path)") }
        if geteuid() == 0 {
            guard chown(draft, 0, groupID(of: "qbd") ?? 0) == 0 else {
                throw .system("cannot set the owner of \(path)")
            }
        }
        guard Glibc.listen(descriptor, backlog) == 0 else { throw .system("cannot listen at \(path)") }
        guard let identity = try FileIdentity(path: draft), rename(draft, path) == 0 else {
            throw .system("cannot put the socket at \(path)")
        }
        return identity
    }

    fileprivate static func makeFolders(to path: String) throws(ControlError) {
        for index in path.indices.dropFirst() where path[index] == "/" {
            let folder = String(path[..<index])
            if mkdir(folder, 0o755) != 0, errno != EEXIST { throw .system("cannot make the folder \(folder)") }
        }
    }

    fileprivate static func refuseLivingOwner(_ path: String, _ address: UnixAddress) throws(ControlError) {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            if errno == ENOENT { return }
            throw .system("cannot look at \(path)")
        }
        guard status.st_mode & S_IFMT == S_IFSOCK else {
            throw ControlError(EEXIST, "\(path) is there already and is not a socket: remove it or choose another path")
        }
        let probe = socket(AF_UNIX, socketKind, 0)
        guard probe >= 0 else { throw .system("cannot make a socket for \(path)") }
        defer { Glibc.close(probe) }
        // Refused: nobody listens, a dead daemon left it. EAGAIN: somebody does, and is busy.
        if address.withPointer({ connect(probe, $0, $1) }) == 0 || errno == EAGAIN {
            throw ControlError(
                EADDRINUSE, "another process answers at \(path): stop it, or choose another path with --socket")
        }
        guard errno == ECONNREFUSED else { throw .system("cannot tell whether somebody listens at \(path)") }
    }

    private static func groupID(of name: String) -> gid_t? {
        var entry = group()
        var found: UnsafeMutablePointer<group>?
        var room = [CChar](repeating: 0, count: 16 << 10)
        guard getgrnam_r(name, &entry, &room, room.count, &found) == 0, found != nil else { return nil }
        return entry.gr_gid
    }
}

extension ControlError {
    /// What a system call of this thread just failed with.
    static func system(_ what: String) -> ControlError {
        let code = errno
        return ControlError(code, "\(what): \(String(cString: strerror(code)))")
    }
}
