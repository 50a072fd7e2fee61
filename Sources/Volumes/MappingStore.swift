import Backend
import EventLoop
import FoundationEssentials
import Glibc
import NBD

/// What is known of a mapping when the daemon that made it is gone.
package struct MappingDocument: Codable, Sendable, Equatable {
    package var pool: String
    package var volume: String
    package var volumeID: UInt64
    /// Absolute path.
    package var config: String
    package var readOnly: Bool
    package var deviceID: UInt32
    /// The kernel device; nil for a volume that is only exported.
    package var device: Device?
    /// What becomes of its I/O; nil for what is usual.
    package var gate: Gate?
    /// Nil for none.
    package var limits: ThrottleLimits?
    /// Seconds since 1970 when a flush failed: every later one fails, too. Nil when none did.
    package var flushesFailSince: Int64?

    package struct Device: Codable, Sendable, Equatable {
        /// What the kernel knows the mapping by, at `/sys/block/nbdX/backend`. It alone says which device is ours.
        package var identifier: String
        /// `/dev/nbdX`, when the user asked for a certain one.
        package var wanted: String?

        package init(identifier: String, wanted: String? = nil) {
            self.identifier = identifier
            self.wanted = wanted
        }
    }

    package struct Gate: Codable, Sendable, Equatable {
        package var state: GateState
        /// Seconds since 1970.
        package var since: Int64
    }

    package var name: String { "\(pool)/\(volume)" }

    package init(
        pool: String, volume: String, volumeID: UInt64, config: String, readOnly: Bool, deviceID: UInt32,
        device: Device? = nil
    ) {
        self.pool = pool
        self.volume = volume
        self.volumeID = volumeID
        self.config = config
        self.readOnly = readOnly
        self.deviceID = deviceID
        self.device = device
    }
}

/// What an administrator set on a mapping; survives the daemon.
package struct VolumeSettings: Sendable {
    var gate = GateState.normal
    /// Seconds since 1970 when that state was entered.
    var gateSince = Int64(time(nil))
    var limits: ThrottleLimits
    /// Seconds since 1970; of the daemon before.
    var flushesFailSince: Int64?

    package init(limits: ThrottleLimits = .none) { self.limits = limits }

    init(_ document: MappingDocument) {
        limits = document.limits ?? .none
        flushesFailSince = document.flushesFailSince
        if let gate = document.gate { (self.gate, gateSince) = (gate.state, gate.since) }
    }
}

/// The documents of all mappings, one file each, in the daemon's state folder, which one daemon has at a time.
/// Blocking; on the blocking-work thread.
package final class MappingStore: Sendable {
    private static let suffix = ".mapping"
    private let path: String
    private let lock: Int32
    /// Tells the devices of this folder from those of another daemon on the same host.
    private let id: UInt32

    /// - Parameter path: the folder; it is made when missing, its parents too.
    package init(path: String) throws(BackendError) {
        self.path = path
        var parent = ""
        for part in path.split(separator: "/").dropLast() {
            parent += "/" + part
            if mkdir(parent, 0o755) != 0, errno != EEXIST, errno != EISDIR, errno != EROFS {
                let code = errno
                throw BackendError(
                    code: code,
                    message: "the folder \(parent) for the daemon's state cannot be made: \(errnoText(code))")
            }
        }
        let directory = try Directory(path: path)
        lock = try directory.open("~lock", O_RDWR | O_CREAT)
        guard flock(lock, LOCK_EX | LOCK_NB) == 0 else {
            Glibc.close(lock)
            throw BackendError(
                code: EBUSY,
                message: "another qbdd runs with the state folder \(path); stop it, or name another one with --state")
        }
        do throws(BackendError) { id = try Self.identity(directory) } catch {
            Glibc.close(lock)
            throw error
        }
    }

    /// The folder's number. One that was lost is found in the documents, as all devices would be foreign with another.
    private static func identity(_ directory: borrowing Directory) throws(BackendError) -> UInt32 {
        if try directory.exists("id") {
            let text = String(decoding: try directory.read("id"), as: UTF8.self)
            if let number = UInt32(text.prefix { $0 != "\n" }, radix: 16), number > 0 { return number }
        }
        let (documents, damaged) = try load(directory)
        let made = Set(
            documents.compactMap { $0.device }.compactMap { DeviceIdentifier($0.identifier) }.map { $0.cookie >> 32 })
        guard made.count <= 1, !made.isEmpty || damaged.isEmpty else {
            throw BackendError(
                code: EIO,
                message:
                    "\(directory.path)/id is missing or damaged, and of what is there it cannot be told which devices"
                    + " are this daemon's\(damaged.first.map { ": \($0)" } ?? ""); write into it the first 8 digits behind the"
                    + " last colon of /sys/block/nbdX/backend of one of its devices, or, if it has none, remove what is"
                    + " damaged")
        }
        let id = made.first.flatMap { UInt32(exactly: $0) } ?? .random(in: 1 ... .max)
        try directory.write(String(id, radix: 16) + "\n", to: "~id")
        try directory.rename("~id", to: "id")
        try directory.synchronize()
        return id
    }

    deinit { Glibc.close(lock) }

    /// What a new device is to be known by.
    package func newIdentifier(_ deviceID: UInt32, _ name: String) -> DeviceIdentifier {
        let cookie = UInt64(id) << 32 | UInt64(UInt32.random(in: 0 ... .max))
        return DeviceIdentifier(deviceID: deviceID, volume: name, cookie: cookie)
    }

    /// Whether the device was made by a daemon with this folder.
    package func made(_ identifier: DeviceIdentifier) -> Bool { identifier.cookie >> 32 == UInt64(id) }

    /// Bytes of a file's name in Linux, less that of the `~` in front of one that is being written.
    private static let longestName = 254

    /// `@` stands in no pool's name, so two volumes never share a file; names that are too long for one are told apart by
    /// a hash behind `=`, which stands in no name.
    package static func file(_ pool: String, _ volume: String) -> String {
        let name = "\(pool)@\(volume)"
        if name.utf8.count + suffix.utf8.count <= longestName { return name + suffix }
        // FNV-1a.
        let hash = name.utf8.reduce(0xcbf2_9ce4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
        let digits = String(hash, radix: 16)
        let end = "=" + String(repeating: "0", count: 16 - digits.count) + digits + suffix
        return String(decoding: name.utf8.prefix(longestName - end.utf8.count), as: UTF8.self) + end
    }

    /// EEXIST when two names that are too long have the same file.
    private static func checkOwner(
        _ file: String, _ document: MappingDocument, _ directory: borrowing Directory
    ) throws(BackendError) {
        guard file.contains("="), try directory.exists(file), let other = try? read(file, directory),
            other.name != document.name
        else { return }
        throw BackendError(
            code: EEXIST,
            message:
                "\(directory.path)/\(file) is the file of \(other.name), too; name one of the two volumes otherwise")
    }

    private static func read(_ file: String, _ directory: borrowing Directory) throws(BackendError) -> MappingDocument {
        let bytes = try directory.read(file)
        do { return try JSONDecoder().decode(MappingDocument.self, from: Data(bytes)) } catch {
            throw BackendError(
                code: EBADMSG, message: "\(directory.path)/\(file) is \(bytes.isEmpty ? "empty" : "damaged")")
        }
    }

    /// Changes what is written of a mapping, if there is something.
    package func change(pool: String, volume: String, _ change: (inout MappingDocument) -> Void) throws(BackendError) {
        let directory = try Directory(path: path)
        let file = Self.file(pool, volume)
        guard try directory.exists(file) else { return }
        var document = try Self.read(file, directory)
        change(&document)
        try save(document)
    }

    /// Returns when the document is durable.
    package func save(_ document: MappingDocument) throws(BackendError) {
        let directory = try Directory(path: path)
        let file = Self.file(document.pool, document.volume)
        try Self.checkOwner(file, document, directory)
        let text: String
        do {
            let encoder = JSONEncoder()
            encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
            text = String(decoding: try encoder.encode(document), as: UTF8.self) + "\n"
        } catch { throw BackendError(code: EIO, message: "\(path)/\(file): \(error)") }
        // What is no document is none to go back to.
        let isFile = try directory.status(of: file).map { $0.st_mode & S_IFMT == S_IFREG } ?? false
        let old = isFile ? try directory.read(file) : nil
        try directory.write(text, to: "~" + file)
        try directory.rename("~" + file, to: file)
        do throws(BackendError) { try directory.synchronize() } catch {
            // What is told to have failed must not be found by the next daemon.
            try Self.putBack(old, file, directory, after: error)
            throw error
        }
    }

    private static func putBack(
        _ old: [UInt8]?, _ file: String, _ directory: borrowing Directory, after failure: BackendError
    ) throws(BackendError) {
        do throws(BackendError) {
            guard let old else { return try directory.remove(file) }
            try directory.write(String(decoding: old, as: UTF8.self), to: "~" + file)
            try directory.rename("~" + file, to: file)
        } catch {
            throw BackendError(
                code: failure.code,
                message: "\(failure.message); and \(directory.path)/\(file) could not be put back as it was"
                    + " (\(error.message)): a daemon that is started again goes by it")
        }
    }

    package func remove(pool: String, volume: String) throws(BackendError) {
        let directory = try Directory(path: path)
        try directory.remove(Self.file(pool, volume))
        try directory.synchronize()
    }

    /// Every document that is whole, by device id, and a sentence for each that is not. Fails when it is not known which
    /// there are.
    package func load() throws(BackendError) -> (documents: [MappingDocument], damaged: [String]) {
        try Self.load(try Directory(path: path))
    }

    private static func load(
        _ directory: borrowing Directory
    ) throws(BackendError) -> (documents: [MappingDocument], damaged: [String]) {
        var documents: [MappingDocument] = []
        var damaged: [String] = []
        for file in try directory.names() where file.hasSuffix(suffix) {
            if file.hasPrefix("~") {
                // Of a daemon that was killed while it wrote. Where it cannot be removed, the next one writes over it.
                try? directory.remove(file)
                continue
            }
            do throws(BackendError) {
                let document = try read(file, directory)
                guard file == Self.file(document.pool, document.volume) else {
                    damaged.append("\(directory.path)/\(file) speaks of \(document.name); it is left alone")
                    continue
                }
                documents.append(document)
            } catch {
                // Of the names, only a snapshot's volume holds the sign, behind the first.
                let name = file.dropLast(suffix.count).split(separator: "@", maxSplits: 1).joined(separator: "/")
                damaged.append(
                    "\(error.message): the mapping of \(name) is not taken over; map it again, and if it has a device,"
                        + " unmap it first")
            }
        }
        return (documents.sorted { $0.deviceID < $1.deviceID }, damaged)
    }
}
