import Backend

/// The description file of a volume: `key = value` lines, for people and for the pool.
package struct VolumeDescription: Sendable, Equatable {
    package var record: VolumeRecord
    /// The layer that the volume writes to; nil for a volume without snapshots, whose data is in the .raw file of its
    /// name.
    package var head: UInt64?
    /// Oldest first.
    package var snapshots: [LocalSnapshot] = []

    /// A snapshot and the layer that holds what it has of its own.
    package struct LocalSnapshot: Sendable, Equatable {
        package var record: SnapshotRecord
        package var layer: UInt64

        package init(record: SnapshotRecord, layer: UInt64) {
            self.record = record
            self.layer = layer
        }
    }

    package init(_ record: VolumeRecord) { self.record = record }

    package func snapshot(_ name: String) -> LocalSnapshot? { snapshots.first { $0.record.name == name } }

    // MARK: Text

    /// A qbd that knows no layers refuses the second version.
    package func encode() -> String {
        var text = """
            # qbd volume; its data is in \(head == nil ? "the .raw file of the same name" : "layers, the files that begin with @")
            version = \(head == nil ? 1 : 2)
            id = \(hexadecimal(record.id))
            size = \(record.size)
            block_size = \(record.blockSize)
            created = \(record.created ?? 0)

            """
        if let head { text += "head = \(hexadecimal(head))\n" }
        for snapshot in snapshots {
            let record = snapshot.record
            text += "snapshot = \(record.name) \(hexadecimal(record.id)) \(hexadecimal(snapshot.layer))"
            text += " \(record.size) \(record.created)\n"
        }
        return text
    }

    /// - Parameter file: for the error text.
    package static func decode(
        _ bytes: [UInt8], volume: String, file: String
    ) throws(BackendError) -> VolumeDescription {
        let lines = try KeyValueLines(bytes, file: file)
        let version = try lines.number("version")
        guard version == 1 || version == 2 else {
            throw BackendError(
                code: 95, message: "\(file): version \(version) of the description; a newer qbd wrote it")
        }
        let blockSize = try lines.number("block_size")
        let size = try lines.number("size")
        guard blockSize == 512 || blockSize == 4096, size > 0, size % blockSize == 0, size <= Layer.maximumSize else {
            throw lines.damaged("size \(size) and block_size \(blockSize) do not fit")
        }
        var description = VolumeDescription(
            VolumeRecord(
                id: try lines.number("id"), volume: volume, size: size, blockSize: UInt32(blockSize),
                created: Int64(clamping: try lines.number("created"))))
        guard version == 2 else { return description }
        description.head = try lines.number("head")
        for value in lines.values("snapshot") {
            let fields = value.split(separator: " ")
            guard fields.count == 5, let id = parsed(fields[1]), let layer = parsed(fields[2]),
                let size = parsed(fields[3]), size <= Layer.maximumSize, let created = parsed(fields[4])
            else { throw lines.damaged("'\(value.prefix(64))' is no snapshot") }
            description.snapshots.append(
                LocalSnapshot(
                    record: SnapshotRecord(
                        id: id, name: String(fields[0]), size: size, created: Int64(clamping: created)),
                    layer: layer))
        }
        return description
    }
}

/// Text of `key = value` lines and comments.
struct KeyValueLines {
    private let lines: [(key: Substring, value: Substring)]
    private let file: String

    /// - Parameter file: for the error text.
    init(_ bytes: some Sequence<UInt8>, file: String) throws(BackendError) {
        self.file = file
        var lines: [(key: Substring, value: Substring)] = []
        guard let text = String(validating: bytes, as: UTF8.self) else { throw Self.damaged(file, "it is not text") }
        for line in text.split(whereSeparator: \.isNewline) where !line.hasPrefix("#") {
            let parts = line.split(separator: "=", maxSplits: 1)
            guard parts.count == 2 else { throw Self.damaged(file, "line '\(line.prefix(64))' is not key = value") }
            lines.append((parts[0].trimmingBlanks, parts[1].trimmingBlanks))
        }
        self.lines = lines
    }

    func values(_ key: Substring) -> [Substring] { lines.filter { $0.key == key }.map(\.value) }

    func text(_ key: Substring) throws(BackendError) -> Substring {
        guard let value = values(key).last else { throw damaged("\(key) is missing") }
        return value
    }

    func number(_ key: Substring) throws(BackendError) -> UInt64 {
        let value = try text(key)
        guard let number = parsed(value) else { throw damaged("the value of \(key.prefix(64)) is not a number") }
        return number
    }

    func damaged(_ what: String) -> BackendError { Self.damaged(file, what) }

    private static func damaged(_ file: String, _ what: String) -> BackendError {
        BackendError(code: 5, message: "\(file) is damaged: \(what); restore it, or delete the volume with --force")
    }
}

/// A number in decimal or, behind 0x, in hexadecimal digits.
private func parsed(_ text: Substring) -> UInt64? {
    text.hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : UInt64(text)
}

func hexadecimal(_ number: UInt64) -> String { "0x" + String(number, radix: 16) }

extension Substring {
    fileprivate var trimmingBlanks: Substring {
        var rest = drop { $0 == " " || $0 == "\t" }
        while let last = rest.last, last == " " || last == "\t" || last == "\r" { rest.removeLast() }
        return rest
    }
}
