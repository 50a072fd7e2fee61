import Glibc

extension DaemonConfiguration {
    /// Where the file is when neither an option nor the environment says otherwise.
    package static let defaultPath = "/etc/neonsan/qbd.conf"

    /// Reads and parses the file. Blocks as long as its file system does: not for a volume's loop.
    ///
    /// - Throws: with `systemError` set when the file could not be read (ENOENT when there is none).
    package static func load(path: String) throws(ConfigurationError) -> DaemonConfiguration {
        try DaemonConfiguration(parsing: readFile(path), file: path)
    }

    private static func readFile(_ path: String) throws(ConfigurationError) -> [UInt8] {
        guard !path.utf8.contains(0) else {
            throw ConfigurationError("the path \(excerpt(path)) holds a NUL byte", systemError: EINVAL)
        }
        // O_NONBLOCK: a path that turns out to be a FIFO must not hang the daemon.
        let descriptor = retrying { open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY) }
        guard descriptor >= 0 else { throw failure(path, errno) }
        defer { close(descriptor) }

        var status = stat()
        guard fstat(descriptor, &status) == 0 else { throw failure(path, errno) }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw ConfigurationError(
                "cannot read the configuration: not a regular file", file: path,
                systemError: status.st_mode & S_IFMT == S_IFDIR ? EISDIR : EINVAL)
        }

        // One byte more than allowed is read, so that a file that grows meanwhile is noticed as well.
        let limit = LineReader.maximumFileLength + 1
        var bytes: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 64 << 10)
        while bytes.count < limit {
            let count = retrying { chunk.withUnsafeMutableBytes { read(descriptor, $0.baseAddress, $0.count) } }
            guard count >= 0 else { throw failure(path, errno) }
            guard count > 0 else { break }
            bytes += chunk[..<count]
        }
        return bytes
    }

    private static func failure(_ path: String, _ code: Int32) -> ConfigurationError {
        let remedy = code == ENOENT ? "; create it, or name another with --config" : ""
        return ConfigurationError(
            "cannot read the configuration: \(String(cString: strerror(code)))\(remedy)", file: path,
            systemError: code)
    }

    private static func retrying<Result: FixedWidthInteger>(_ call: () -> Result) -> Result {
        while true {
            let result = call()
            if result != -1 || errno != EINTR { return result }
        }
    }
}
