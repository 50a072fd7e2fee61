import Glibc

extension MapFile {
    /// Where the file is when no option says otherwise.
    package static let defaultPath = "/etc/neonsan/map.conf"

    /// Reads and parses the file. Blocks as long as its file system does.
    ///
    /// - Throws: with `systemError` set when the file could not be read (ENOENT when there is none).
    package static func load(path: String) throws(ConfigurationError) -> MapFile {
        let bytes = try ConfigurationFile.read(
            path, as: "the list of volumes", remedy: "create it, or name another with --file")
        return try MapFile(parsing: bytes, file: path)
    }

    /// Writes the volume's line into the file, which is made when there is none.
    package static func save(_ entry: MapEntry, path: String) throws(ConfigurationError) {
        try change(path, creating: true) { $0.saving(entry) }
    }

    /// Takes the volume's line out of the file.
    ///
    /// - Returns: false when the file has no such line.
    package static func forget(_ name: VolumeName, path: String) throws(ConfigurationError) -> Bool {
        try change(path, creating: false) { $0.forgetting(name) }
    }

    /// Puts a new file in the place of the old one, so that a reader, and a crash, sees one of the two whole. Whoever
    /// changes files of one folder at the same time waits: its lock is the folder's.
    ///
    /// - Returns: whether there was anything to change.
    @discardableResult
    private static func change(
        _ path: String, creating: Bool, _ make: (MapFile) -> [UInt8]?
    ) throws(ConfigurationError) -> Bool {
        // A link to the file stays a link.
        let place = try Place(following: path)
        let folder = try place.openFolder()
        defer { close(folder) }
        try place.lock(folder)

        let file: MapFile
        do throws(ConfigurationError) {
            file = try load(path: place.path)
        } catch {
            guard creating, error.systemError == ENOENT else { throw error }
            file = try MapFile(parsing: [], file: place.path)
        }
        guard let bytes = make(file) else { return false }
        try place.replace(in: folder, by: bytes)
        return true
    }

    private struct Place {
        let path: String
        let folder: String
        let name: String

        init(_ path: String) {
            self.path = path
            let parts = path.utf8.split(separator: UInt8(ascii: "/")).map { String($0) ?? "" }
            name = parts.last ?? ""
            folder =
                path.hasPrefix("/")
                ? "/" + parts.dropLast().joined(separator: "/")
                : parts.count > 1 ? parts.dropLast().joined(separator: "/") : "."
        }

        /// A file that is not there is made where the path says.
        init(following path: String) throws(ConfigurationError) {
            guard let resolved = realpath(path, nil) else {
                let code = errno
                self.init(path)
                guard code == ENOENT else { throw failure(code) }
                return
            }
            defer { free(resolved) }
            self.init(String(cString: resolved))
        }

        /// Seconds that somebody else may have the folder's lock.
        private static let lockLimit = 10

        /// EBUSY when somebody else has it for longer.
        func lock(_ folder: Int32) throws(ConfigurationError) {
            for _ in 0..<(Self.lockLimit * 100) {
                if ConfigurationFile.retrying({ flock(folder, LOCK_EX | LOCK_NB) }) == 0 { return }
                guard errno == EWOULDBLOCK else { throw failure(errno) }
                usleep(10_000)
            }
            throw failure(EBUSY)
        }

        func failure(_ code: Int32) -> ConfigurationError {
            ConfigurationError(
                "cannot write the list of volumes: \(String(cString: strerror(code)))", file: path, systemError: code)
        }

        func openFolder() throws(ConfigurationError) -> Int32 {
            guard !name.isEmpty, !path.utf8.contains(0) else { throw failure(EINVAL) }
            let descriptor = ConfigurationFile.retrying { open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) }
            guard descriptor >= 0 else { throw failure(errno) }
            return descriptor
        }

        /// The new file has the old one's owner and mode.
        func replace(in folder: Int32, by bytes: [UInt8]) throws(ConfigurationError) {
            let temporary = ".\(name).new"
            let flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC
            // What a crash left there under this name goes, whatever it is.
            guard unlinkat(folder, temporary, 0) == 0 || errno == ENOENT else { throw failure(errno) }
            let descriptor = ConfigurationFile.retrying { openat(folder, temporary, flags, 0o600) }
            guard descriptor >= 0 else { throw failure(errno) }
            let code = fill(descriptor, with: bytes, modelled: folder)
            close(descriptor)
            guard code == 0, renameat(folder, temporary, folder, name) == 0 else {
                let code = code == 0 ? errno : code
                unlinkat(folder, temporary, 0)
                throw failure(code)
            }
            guard fsync(folder) == 0 else { throw failure(errno) }
        }

        /// - Returns: an errno, 0 for success.
        private func fill(_ descriptor: Int32, with bytes: [UInt8], modelled folder: Int32) -> Int32 {
            var old = stat()
            let exists = fstatat(folder, name, &old, 0) == 0
            if !exists, errno != ENOENT { return errno }
            if exists, fchown(descriptor, old.st_uid, old.st_gid) != 0 { return errno }
            guard fchmod(descriptor, exists ? old.st_mode & 0o7777 : 0o644) == 0 else { return errno }
            var rest = bytes[...]
            while !rest.isEmpty {
                let count = ConfigurationFile.retrying {
                    rest.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
                }
                guard count >= 0 else { return errno }
                rest = rest.dropFirst(count)
            }
            return fsync(descriptor) == 0 ? 0 : errno
        }
    }
}
