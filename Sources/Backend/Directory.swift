import CLinux
import EventLoop
import Glibc

/// An open directory and its files by name: every path stays inside it. All calls block.
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
    private static func call(_ operation: String, _ body: () -> Int32) throws(BackendError) -> Int32 {
        do { return try retrying(operation, body) } catch { throw BackendError(error) }
    }

    package func open(_ file: String, _ flags: Int32, mode: mode_t = 0o600) throws(BackendError) -> Int32 {
        try Self.call("open \(path)/\(file)") { qbd_openat(descriptor, file, flags | O_CLOEXEC | O_NOFOLLOW, mode) }
    }

    package func exists(_ file: String) -> Bool { faccessat(descriptor, file, F_OK, AT_SYMLINK_NOFOLLOW) == 0 }

    package func rename(_ old: String, to new: String) throws(BackendError) {
        try Self.call("rename \(path)/\(old) to \(new)") { renameat(descriptor, old, descriptor, new) }
    }

    /// - Returns: false when it cannot be looked at.
    package func look(at file: String, _ status: inout stat) -> Bool {
        fstatat(descriptor, file, &status, AT_SYMLINK_NOFOLLOW) == 0
    }

    /// Gives a file a second name.
    package func link(_ file: String, to new: String) throws(BackendError) {
        try Self.call("link \(path)/\(file) to \(new)") { linkat(descriptor, file, descriptor, new, 0) }
    }

    /// Removes the file if it is there.
    package func remove(_ file: String) throws(BackendError) {
        do { try Self.call("remove \(path)/\(file)") { unlinkat(descriptor, file, 0) } } catch {
            guard error.code == ENOENT else { throw error }
        }
    }

    /// Makes renames and removals durable.
    package func synchronize() throws(BackendError) {
        try Self.call("synchronize \(path)") { fsync(descriptor) }
    }

    /// Holds the pool for one change, against other threads and other daemons; released with the descriptor.
    /// - Returns: a descriptor to close.
    package func lock() throws(BackendError) -> Int32 {
        let lock = try open(Self.lockFile, O_RDWR | O_CREAT)
        do { try Self.call("lock \(path)") { flock(lock, LOCK_EX) } } catch {
            Glibc.close(lock)
            throw error
        }
        return lock
    }

    /// Writes a whole small file durably under a new name; the caller renames it. EFBIG when it is larger than
    /// `maximumFile`.
    package func write(_ text: String, to file: String) throws(BackendError) {
        guard text.utf8.count <= Self.maximumFile else { throw tooLarge(file, "would have \(text.utf8.count) bytes") }
        let output = try open(file, O_WRONLY | O_CREAT | O_TRUNC)
        defer { Glibc.close(output) }
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = try Self.call("write \(path)/\(file)") {
                Int32(bytes.withUnsafeBytes { Glibc.write(output, $0.baseAddress, $0.count) })
            }
            bytes = bytes.dropFirst(Int(count))
        }
        try Self.call("synchronize \(path)/\(file)") { fsync(output) }
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

    /// File names, sorted as byte strings.
    package func names() throws(BackendError) -> [String] {
        let copy = try open(".", O_RDONLY | O_DIRECTORY)
        guard let stream = fdopendir(copy) else {
            let code = errno
            Glibc.close(copy)
            throw BackendError(code: code, message: "read \(path): \(errnoText(code))")
        }
        defer { closedir(stream) }
        var names: [String] = []
        while let entry = readdir(stream) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) { name in
                name.withMemoryRebound(to: CChar.self, capacity: 256) { String(validatingCString: $0) }
            }
            // A name that is not UTF-8 is none of ours.
            if let name { names.append(name) }
        }
        return names.sorted()
    }
}
