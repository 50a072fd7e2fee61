import Glibc

/// Which file a path means at the moment.
struct FileIdentity: Equatable {
    let device: UInt64
    let inode: UInt64

    /// Nil when nothing has the path.
    init?(path: String) throws(ControlError) {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            guard errno == ENOENT else { throw .system("cannot look at \(path)") }
            return nil
        }
        self.init(status)
    }

    fileprivate init(_ status: stat) {
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
    }
}

/// An exclusive lock that dies with its process; part of a `ControlPath`.
package struct LockFile: ~Copyable {
    private let descriptor: CInt
    private let path: String
    private let identity: FileIdentity

    init(path: String, guarding socket: String) throws(ControlError) {
        while true {
            // O_NONBLOCK: what turns out to be something else than a file is not waited for.
            let descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0o600)
            guard descriptor >= 0 else { throw .system("cannot open the lock \(path)") }
            let opened: FileIdentity
            do throws(ControlError) { opened = try Self.regular(descriptor, path) } catch {
                close(descriptor)
                throw error
            }
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
            let named: FileIdentity?
            do throws(ControlError) { named = try FileIdentity(path: path) } catch {
                close(descriptor)
                throw error
            }
            if opened == named {
                self.descriptor = descriptor
                self.path = path
                identity = opened
                return
            }
            close(descriptor)
        }
    }

    private static func regular(_ descriptor: CInt, _ path: String) throws(ControlError) -> FileIdentity {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw .system("cannot look at the lock \(path)") }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw ControlError(EINVAL, "the lock \(path) is no regular file: remove it or choose another path")
        }
        return FileIdentity(status)
    }

    /// The file goes first, then the lock on it: whoever waits for it sees that it is gone.
    deinit {
        // What somebody else has put there, or what cannot be told, stays.
        if let named = try? FileIdentity(path: path), named == identity { unlink(path) }
        close(descriptor)
    }
}
