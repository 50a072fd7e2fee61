import Glibc

/// A file of text that somebody wrote for qbd, read whole.
enum ConfigurationFile {
    /// Blocks as long as its file system does: not for a volume's loop.
    ///
    /// - Parameters:
    ///   - what: the file in an error's text, as in "the configuration".
    ///   - remedy: what to do when there is none.
    ///   - mayRead: asked with the opened file's status before anything of it is read; false is EACCES.
    /// - Throws: with `systemError` set (ENOENT when there is none).
    static func read(
        _ path: String, as what: String, remedy: String, mayRead: (stat) -> Bool = { _ in true }
    ) throws(ConfigurationError) -> [UInt8] {
        guard !path.utf8.contains(0) else {
            throw ConfigurationError("the path \(excerpt(path)) holds a NUL byte", systemError: EINVAL)
        }
        func failure(_ code: Int32) -> ConfigurationError {
            ConfigurationError(
                "cannot read \(what): \(String(cString: strerror(code)))" + (code == ENOENT ? "; \(remedy)" : ""),
                file: path, systemError: code)
        }
        // O_NONBLOCK: a path that turns out to be a FIFO must not hang the program.
        let descriptor = retrying { open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY) }
        guard descriptor >= 0 else { throw failure(errno) }
        defer { close(descriptor) }

        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw failure(errno) }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw ConfigurationError(
                "cannot read \(what): not a regular file", file: path,
                systemError: status.st_mode & S_IFMT == S_IFDIR ? EISDIR : EINVAL)
        }
        guard mayRead(status) else {
            throw ConfigurationError(
                "cannot read \(what): who asks for it has no permission to read it", file: path, systemError: EACCES)
        }

        // One byte more than allowed is read, so that a file that grows meanwhile is noticed as well.
        let limit = LineReader.maximumFileLength + 1
        var bytes: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 64 << 10)
        while bytes.count < limit {
            let count = retrying { chunk.withUnsafeMutableBytes { Glibc.read(descriptor, $0.baseAddress, $0.count) } }
            guard count >= 0 else { throw failure(errno) }
            guard count > 0 else { break }
            bytes += chunk[..<count]
        }
        return bytes
    }

    static func retrying<Result: FixedWidthInteger>(_ call: () -> Result) -> Result {
        while true {
            let result = call()
            if result != -1 || errno != EINTR { return result }
        }
    }
}
