import Configuration
import Glibc

extension VolumeName {
    /// Whether a name is to have a snapshot behind its volume.
    package enum SnapshotPart { case none, allowed, required }

    /// A volume's name that this version can do something with; checked by the command and again by the daemon.
    ///
    /// - Throws: code 22 for what is no name, or has a snapshot where none is allowed, or none where one is required; 95
    ///   for `rdma://`.
    package static func reachable(
        _ text: String, snapshot: SnapshotPart = .none
    ) throws(ControlError) -> VolumeName {
        let name: VolumeName
        do throws(ConfigurationError) {
            name = try VolumeName(parsing: text)
        } catch {
            throw .invalid("\(error)")
        }
        switch (snapshot, name.snapshot) {
        case (.none, .some):
            throw .invalid("\(name) is a snapshot, and this takes a volume: \(name.pool)/\(name.volume)")
        case (.required, nil): throw .invalid("\(name) is a volume, and this takes a snapshot: \(name)@SNAPSHOT")
        default: break
        }
        if name.transport == .rdma { throw Feature.rdma.comesLater }
        return name
    }
}

/// The path of a configuration file, as the command sends it and the daemon keeps it.
package enum ConfigPath {
    /// An absolute path in one spelling, because a configuration is known by its path: without empty and `.` components,
    /// and without `..` behind a folder. Behind a symbolic link `..` leads somewhere else, and stays.
    package static func canonical(_ path: String) -> String {
        var folders = ""
        for component in path.utf8.split(separator: UInt8(ascii: "/")).map({ String(Substring($0)) }) {
            if component == "." || component == ".." && folders.isEmpty { continue }
            var status = stat()
            if component == "..", lstat(folders, &status) == 0, status.st_mode & S_IFMT == S_IFDIR,
                let last = folders.lastIndex(of: "/"), !folders.hasSuffix("/..")
            {
                folders = String(folders[..<last])
            } else {
                folders += "/" + component
            }
        }
        return folders.isEmpty ? "/" : folders
    }

    /// - Returns: the path as it is.
    /// - Throws: code 22 unless it is absolute and can be a field of the list, which is split on blanks.
    package static func validate(_ path: String) throws(ControlError) -> String {
        guard path.hasPrefix("/") else {
            throw .invalid("the path of the configuration must be absolute, and '\(path)' is not")
        }
        let strangers = path.unicodeScalars.contains {
            $0.properties.isWhitespace || $0.value < 0x20 || $0.value == 0x7f
        }
        guard !strangers else {
            throw .invalid(
                "the path of the configuration cannot hold a blank, because the fields of 'qbd list' end at blanks:"
                    + " '\(path)'")
        }
        guard path.utf8.count < 4096 else { throw .invalid("the path of the configuration is longer than 4095 bytes") }
        return path
    }
}
