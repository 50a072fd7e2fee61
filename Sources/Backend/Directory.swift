import CLinux
import EventLoop
import Glibc

/// An open directory and its files by name: every path stays inside it. All calls block.
///
/// Others may write there: what is opened is opened without waiting for anybody and is a regular file, or the call fails.
/// And what a call could not find out is an error, never the answer "not there".
package struct Directory: ~Copyable {
    /// What `lock` locks.
    package static let lockFile = "~lock"
    /// Bytes of the largest file that is written or read as a whole.
    package static let maximumFile = 1 << 20

    package let path: String
    let descriptor: Int32

    /// Opens the directory, made with mode 0700 when it is missing and its parent is there.
    package init(path: String) throws(BackendError) {
        self.path = path
        if mkdir(path, 0o700) != 0, errno != EEXIST {
            let code = errno
            throw BackendError(
                code: code, message: "the directory \(path) cannot be made: \(errnoText(code))")
        }
        descriptor = try Self.call("open the directory \(path)") {
            qbd_open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0)
        }
    }

    deinit { Glibc.close(descriptor) }

    @discardableResult
    private static func call(_ operation: @autoclosure () -> String, _ body: () -> Int32) throws(BackendError) -> Int32
    {
        do { return try retrying(operation(), body) } catch { throw BackendError(error) }
    }

    // MARK: Files

    /// Opens a regular file. EINVAL for anything else, a link among them (ELOOP).
    package func open(_ file: String, _ flags: Int32, mode: mode_t = 0o600) throws(BackendError) -> Int32 {
        // A FIFO without a peer would be waited for, a device might start to do something.
        let opened: Int32
        do throws(BackendError) {
            opened = try Self.call("open \(path)/\(file)") {
                qbd_openat(descriptor, file, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, mode)
            }
        } catch {
            // Of a FIFO or a socket that nobody reads from.
            guard error.code == ENXIO || error.code == ENODEV else { throw error }
            throw notRegular(file)
        }
        var status = stat()
        do throws(BackendError) {
            try Self.call("look at \(path)/\(file)") { fstat(opened, &status) }
            guard status.st_mode & S_IFMT == S_IFREG else { throw notRegular(file) }
            // A read that would wait for the disk would fail with it.
            try Self.call("set flags of \(path)/\(file)") {
                qbd_set_flags(opened, flags & ~(O_CREAT | O_EXCL | O_TRUNC))
            }
        } catch {
            Glibc.close(opened)
            throw error
        }
        return opened
    }

    private func notRegular(_ file: String) -> BackendError {
        BackendError(
            code: EINVAL,
            message: "\(path)/\(file) is no regular file, but something else of that name; move it away")
    }

    /// Makes a new file; one of that name that a crash has left is replaced.
    package func createAnew(_ file: String) throws(BackendError) -> Int32 {
        try remove(file)
        return try open(file, O_RDWR | O_CREAT | O_EXCL)
    }

    /// Whether something has the name, whatever it is.
    package func exists(_ file: String) throws(BackendError) -> Bool { try status(of: file) != nil }

    /// What has the name, itself when it is a link; nil when there is nothing.
    package func status(of file: String) throws(BackendError) -> stat? {
        var status = stat()
        do throws(BackendError) {
            try Self.call("look at \(path)/\(file)") { fstatat(descriptor, file, &status, AT_SYMLINK_NOFOLLOW) }
        } catch {
            guard error.code == ENOENT else { throw error }
            return nil
        }
        return status
    }

    /// Replaces what has the new name.
    package func rename(_ old: String, to new: String) throws(BackendError) {
        try Self.call("rename \(path)/\(old) to \(new)") { renameat(descriptor, old, descriptor, new) }
    }

    /// EEXIST when something has the new name.
    package func renameNew(_ old: String, to new: String) throws(BackendError) {
        do throws(BackendError) {
            try Self.call("rename \(path)/\(old) to \(new)") {
                qbd_rename_new(descriptor, old, descriptor, new)
            }
        } catch {
            // The file system does not know that way of renaming.
            guard error.code == EINVAL || error.code == ENOSYS else { throw error }
            try link(old, to: new)
            try remove(old)
        }
    }

    /// Gives a file a second name. EEXIST when something has it.
    package func link(_ file: String, to new: String) throws(BackendError) {
        try Self.call("link \(path)/\(file) to \(new)") { linkat(descriptor, file, descriptor, new, 0) }
    }

    /// Removes the file if it is there.
    package func remove(_ file: String) throws(BackendError) {
        do throws(BackendError) {
            try Self.call("remove \(path)/\(file)") { unlinkat(descriptor, file, 0) }
        } catch {
            guard error.code == ENOENT else { throw error }
        }
    }

    /// Makes renames and removals durable.
    package func synchronize() throws(BackendError) {
        try Self.call("synchronize \(path)") { fsync(descriptor) }
    }

    // MARK: Lock

    /// Seconds that somebody else may hold the lock.
    package static let lockLimit = 30.0

    /// Holds the directory for one change, against other threads and other daemons; released with the descriptor.
    /// EBUSY when somebody else has it for `lockLimit`.
    /// - Parameter giveUp: asked a few times a second while somebody else has it: an error ends the wait, and is thrown.
    /// - Returns: a descriptor to close.
    package func lock(giveUp: () -> BackendError? = { nil }) throws(BackendError) -> Int32 {
        try lock(O_RDWR | O_CREAT, giveUp)
    }

    /// As `lock`, for who changes nothing: also on a medium that cannot be written to.
    /// - Returns: nil where there is nothing to lock, and nobody can change anything.
    package func lockForReading() throws(BackendError) -> (lock: Int32?, isReadOnly: Bool) {
        do throws(BackendError) { return (try lock(), false) } catch {
            guard error.code == EROFS else { throw error }
        }
        do throws(BackendError) { return (try lock(O_RDONLY, { nil }), true) } catch {
            guard error.code == ENOENT else { throw error }
            return (nil, true)
        }
    }

    private func lock(_ flags: Int32, _ giveUp: () -> BackendError?) throws(BackendError) -> Int32 {
        let end = monotonicNanoseconds() + UInt64(Self.lockLimit * 1e9)
        while true {
            let lock = try open(Self.lockFile, flags)
            do throws(BackendError) {
                try wait(for: lock, until: end, giveUp)
                // Somebody may have removed or replaced the file since: what locks then is another.
                if try isNamed(lock, Self.lockFile) { return lock }
            } catch {
                Glibc.close(lock)
                throw error
            }
            Glibc.close(lock)
        }
    }

    private func wait(for lock: Int32, until end: UInt64, _ giveUp: () -> BackendError?) throws(BackendError) {
        while flock(lock, LOCK_EX | LOCK_NB) != 0 {
            let code = errno
            guard code == EWOULDBLOCK || code == EINTR else {
                throw BackendError(code: code, message: "lock \(path)/\(Self.lockFile): \(errnoText(code))")
            }
            if let error = giveUp() { throw error }
            guard monotonicNanoseconds() < end else {
                throw BackendError(
                    code: EBUSY,
                    message:
                        "\(path) is being changed by somebody else, who has had \(path)/\(Self.lockFile) locked for"
                        + " \(Int(Self.lockLimit)) s; try again when that is over")
            }
            usleep(10_000)
        }
    }

    /// Whether an open file is the one of that name.
    package func isNamed(_ opened: Int32, _ file: String) throws(BackendError) -> Bool {
        var own = stat()
        try Self.call("look at \(path)/\(file)") { fstat(opened, &own) }
        guard let named = try status(of: file) else { return false }
        return own.st_dev == named.st_dev && own.st_ino == named.st_ino
    }

    // MARK: Small files

    /// Writes a whole small file durably under a new name; the caller renames it. EFBIG when it is larger than
    /// `maximumFile`.
    package func write(_ text: String, to file: String) throws(BackendError) {
        guard text.utf8.count <= Self.maximumFile else { throw tooLarge(file, "would have \(text.utf8.count) bytes") }
        let output = try createAnew(file)
        defer { Glibc.close(output) }
        try write(text, on: output, file)
        try Self.call("synchronize \(path)/\(file)") { fsync(output) }
    }

    /// Writes a whole small file durably in place of what a file has, using its space.
    /// - Returns: false when there is no such file, or it is too small.
    package func overwrite(_ file: String, with text: String) throws(BackendError) -> Bool {
        guard let status = try status(of: file), Int(status.st_size) >= text.utf8.count else { return false }
        let output = try open(file, O_WRONLY)
        defer { Glibc.close(output) }
        try write(text, on: output, file)
        try Self.call("shorten \(path)/\(file)") { ftruncate(output, off_t(text.utf8.count)) }
        try Self.call("synchronize \(path)/\(file)") { fsync(output) }
        return true
    }

    /// Makes a file of zeros that take space, durably.
    package func fill(_ file: String, with count: Int) throws(BackendError) {
        let output = try createAnew(file)
        defer { Glibc.close(output) }
        do throws(BackendError) {
            // A file system that writes elsewhere what is written anew would need space again, unless told.
            qbd_write_in_place(output)
            try write(String(repeating: "\0", count: count), on: output, file)
            try Self.call("synchronize \(path)/\(file)") { fsync(output) }
        } catch {
            try remove(file)
            throw error
        }
    }

    private func write(_ text: String, on output: Int32, _ file: String) throws(BackendError) {
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = try Self.call("write \(path)/\(file)") {
                Int32(bytes.withUnsafeBytes { Glibc.write(output, $0.baseAddress, $0.count) })
            }
            bytes = bytes.dropFirst(Int(count))
        }
    }

    /// The contents of a file. EFBIG when it is larger than `maximumFile`.
    package func read(_ file: String) throws(BackendError) -> [UInt8] {
        let input = try open(file, O_RDONLY)
        defer { Glibc.close(input) }
        var bytes: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 16 << 10)
        while true {
            let count = try Self.call("read \(path)/\(file)") {
                Int32(piece.withUnsafeMutableBytes { Glibc.read(input, $0.baseAddress, $0.count) })
            }
            if count == 0 { return bytes }
            bytes += piece.prefix(Int(count))
            guard bytes.count <= Self.maximumFile else {
                throw tooLarge(file, "is larger than what was ever written there")
            }
        }
    }

    private func tooLarge(_ file: String, _ what: String) -> BackendError {
        BackendError(code: EFBIG, message: "\(path)/\(file) \(what); it has at most \(Self.maximumFile) bytes")
    }

    // MARK: Listing

    /// The names of all files, sorted as byte strings.
    package func names() throws(BackendError) -> [String] {
        let copy = try Self.call("open the directory \(path)") {
            qbd_openat(descriptor, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0)
        }
        guard let stream = fdopendir(copy) else {
            let code = errno
            Glibc.close(copy)
            throw BackendError(code: code, message: "read \(path): \(errnoText(code))")
        }
        // A name that is not UTF-8 is none of ours.
        do throws(SystemError) { return try readNames(stream, of: path).sorted() } catch { throw BackendError(error) }
    }
}
