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

    package struct Device: Codable, Sendable, Equatable {
        /// What the kernel knows the mapping by, at `/sys/block/nbdX/backend`. It alone says which device is ours.
        package var identifier: String
        /// `/dev/nbdX`, when the user asked for a certain one.
        package var wanted: String?
    }

    package struct Gate: Codable, Sendable, Equatable {
        package var state: GateState
        /// Seconds since 1970.
        package var since: Int64
    }

    package var name: String { "\(pool)/\(volume)" }
}

/// What an administrator set on a mapping; survives the daemon.
package struct VolumeSettings: Sendable {
    var gate = GateState.normal
    /// Seconds since 1970 when that state was entered.
    var gateSince = Int64(time(nil))
    var limits: ThrottleLimits

    package init(limits: ThrottleLimits = .none) { self.limits = limits }

    init(_ document: MappingDocument) {
        limits = document.limits ?? .none
        if let gate = document.gate { (self.gate, gateSince) = (gate.state, gate.since) }
    }
}

/// The documents of all mappings, one file each, in the daemon's state folder, which one daemon has at a time.
/// Blocking; on the blocking-work thread.
final class MappingStore: Sendable {
    private static let suffix = ".mapping"
    private let path: String
    private let lock: Int32
    /// Tells the devices of this folder from those of another daemon on the same host.
    private let id: UInt32

    /// - Parameter path: the folder; it is made when missing, its parents too.
    init(path: String) throws(BackendError) {
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
        if try directory.exists("id"), let text = String(validating: try directory.read("id"), as: UTF8.self),
            let number = UInt32(text.prefix { $0 != "\n" }, radix: 16)
        {
            id = number
        } else {
            id = .random(in: 1 ... .max)
            try directory.write(String(id, radix: 16) + "\n", to: "~id")
            try directory.rename("~id", to: "id")
            try directory.synchronize()
        }
    }

    deinit { Glibc.close(lock) }

    /// What a new device is to be known by.
    func newIdentifier(_ deviceID: UInt32, _ name: String) -> DeviceIdentifier {
        let cookie = UInt64(id) << 32 | UInt64(UInt32.random(in: 0 ... .max))
        return DeviceIdentifier(deviceID: deviceID, volume: name, cookie: cookie)
    }

    /// Whether the device was made by a daemon with this folder.
    func made(_ identifier: DeviceIdentifier) -> Bool { identifier.cookie >> 32 == UInt64(id) }

    /// `@` stands in no name, so two volumes never share a file.
    private static func file(_ pool: String, _ volume: String) -> String { "\(pool)@\(volume)\(suffix)" }

    /// Returns when the document is durable.
    func save(_ document: MappingDocument) throws(BackendError) {
        let directory = try Directory(path: path)
        let file = Self.file(document.pool, document.volume)
        let text: String
        do {
            let encoder = JSONEncoder()
            encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
            text = String(decoding: try encoder.encode(document), as: UTF8.self) + "\n"
        } catch { throw BackendError(code: EIO, message: "\(path)/\(file): \(error)") }
        try directory.write(text, to: "~" + file)
        try directory.rename("~" + file, to: file)
        try directory.synchronize()
    }

    func remove(pool: String, volume: String) throws(BackendError) {
        let directory = try Directory(path: path)
        try directory.remove(Self.file(pool, volume))
        try directory.synchronize()
    }

    /// Every document that is whole, by device id, and a sentence for each that is not.
    func load() throws(BackendError) -> (documents: [MappingDocument], damaged: [String]) {
        let directory = try Directory(path: path)
        var documents: [MappingDocument] = []
        var damaged: [String] = []
        for file in try directory.names() where file.hasSuffix(Self.suffix) {
            if file.hasPrefix("~") {
                // Of a daemon that was killed while it wrote. Where it cannot be removed, the next one writes over it.
                try? directory.remove(file)
                continue
            }
            do {
                let document = try JSONDecoder().decode(MappingDocument.self, from: Data(try directory.read(file)))
                guard file == Self.file(document.pool, document.volume) else {
                    damaged.append("\(path)/\(file) speaks of \(document.name); it is left alone")
                    continue
                }
                documents.append(document)
            } catch {
                let reason = (error as? BackendError)?.message ?? "\(path)/\(file) is damaged"
                // Of the names, only a snapshot's volume holds the sign, behind the first.
                let name = file.dropLast(Self.suffix.count).split(separator: "@", maxSplits: 1).joined(separator: "/")
                damaged.append(
                    "\(reason): the mapping of \(name) is not taken over; map it again, and if it has a device, unmap it"
                        + " first")
            }
        }
        return (documents.sorted { $0.deviceID < $1.deviceID }, damaged)
    }
}
