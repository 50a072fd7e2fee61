import Glibc

extension DaemonConfiguration {
    /// Where the file is when neither an option nor the environment says otherwise.
    package static let defaultPath = "/etc/neonsan/qbd.conf"

    /// Reads and parses the file. Blocks as long as its file system does: not for a volume's loop.
    ///
    /// - Parameter mayRead: asked with the opened file's status before anything of it is read; false is EACCES.
    /// - Throws: with `systemError` set when the file could not be read (ENOENT when there is none).
    package static func load(
        path: String, mayRead: (stat) -> Bool = { _ in true }
    ) throws(ConfigurationError) -> DaemonConfiguration {
        let bytes = try ConfigurationFile.read(
            path, as: "the configuration", remedy: "create it, or name another with --config",
            mayRead: mayRead)
        return try DaemonConfiguration(parsing: bytes, file: path)
    }
}
