import Glibc

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

/// An exclusive lock that dies with its process; part of a `ControlPath`.
package struct LockFile: ~Copyable {
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
