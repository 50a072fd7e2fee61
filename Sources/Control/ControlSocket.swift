import Glibc

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

    /// Makes the folders to the path where they are missing, takes the path's lock, checks that no other daemon
    /// answers there, and puts a listening socket in place of what a dead daemon left behind. The socket has mode
    /// 0660; with root's rights it belongs to root and to the group `qbd`, if there is one.
    static func listen(at path: String) throws(ControlError) -> ControlSocket {
        let address = try UnixAddress(path)
        // The socket is made beside its path and moved there when it is ready.
        let draft = path + "~"
        let draftAddress = try UnixAddress(draft)
        try makeFolders(to: path)
        let lock = try LockFile(path: path + ".lock", guarding: path)
        try refuseLivingOwner(path, address)

        let descriptor = socket(AF_UNIX, socketKind, 0)
        guard descriptor >= 0 else { throw .system("cannot make a socket for \(path)") }
        do throws(ControlError) {
            unlink(draft)
            guard draftAddress.withPointer({ bind(descriptor, $0, $1) }) == 0 else {
                throw .system("cannot make the socket \(path)")
            }
            let identity = try publish(descriptor, draft: draft, path: path)
            return ControlSocket(descriptor: descriptor, path: path, lock: lock, identity: identity)
        } catch {
            unlink(draft)
            Glibc.close(descriptor)
            throw error
        }
    }

    private init(descriptor: CInt, path: String, lock: consuming LockFile, identity: FileIdentity) {
        self.descriptor = descriptor
        self.path = path
        self.lock = lock
        self.identity = identity
    }

    private static let socketKind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)

    /// Removes the socket's file, if it still is the one made here. Does not close the descriptor.
    consuming func remove() {
        if FileIdentity(path: path) == identity { unlink(path) }
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
        guard let identity = FileIdentity(path: draft), rename(draft, path) == 0 else {
            throw .system("cannot put the socket at \(path)")
        }
        return identity
    }

    private static func makeFolders(to path: String) throws(ControlError) {
        for index in path.indices.dropFirst() where path[index] == "/" {
            let folder = String(path[..<index])
            if mkdir(folder, 0o755) != 0, errno != EEXIST { throw .system("cannot make the folder \(folder)") }
        }
    }

    private static func refuseLivingOwner(_ path: String, _ address: UnixAddress) throws(ControlError) {
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

/// Which file a path means at the moment.
struct FileIdentity: Equatable {
    let device: UInt64
    let inode: UInt64

    init?(path: String) {
        var status = stat()
        guard lstat(path, &status) == 0 else { return nil }
        self.init(status)
    }

    init?(descriptor: CInt) {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { return nil }
        self.init(status)
    }

    private init(_ status: stat) {
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
    }
}

/// An exclusive lock that dies with its process.
private struct LockFile: ~Copyable {
    private let descriptor: CInt
    private let path: String

    init(path: String, guarding socket: String) throws(ControlError) {
        while true {
            let descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o600)
            guard descriptor >= 0 else { throw .system("cannot open the lock \(path)") }
            guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
                let error: ControlError =
                    errno == EWOULDBLOCK
                    ? ControlError(
                        EADDRINUSE, "another qbdd serves \(socket): stop it, or choose another path with --socket")
                    : .system("cannot lock \(path)")
                close(descriptor)
                throw error
            }
            // The owner before us may have removed the file between our open and our lock.
            if FileIdentity(descriptor: descriptor) == FileIdentity(path: path) {
                self.descriptor = descriptor
                self.path = path
                return
            }
            close(descriptor)
        }
    }

    /// The file goes first, then the lock on it: whoever waits for it sees that it is gone.
    deinit {
        unlink(path)
        close(descriptor)
    }
}

extension ControlError {
    /// What a system call of this thread just failed with.
    static func system(_ what: String) -> ControlError {
        let code = errno
        return ControlError(code, "\(what): \(String(cString: strerror(code)))")
    }
}
