import Backend

/// The description file beside a volume's data: `key = value` lines, for people and for the pool.
package enum VolumeDescription {
    private static let version: UInt64 = 1

    package static func encode(_ record: VolumeRecord) -> String {
        """
        # qbd volume; its data is in the .raw file of the same name
        version = \(version)
        id = 0x\(String(record.id, radix: 16))
        size = \(record.size)
        block_size = \(record.blockSize)
        created = \(record.created)

        """
    }

    /// - Parameter file: for the error text.
    package static func decode(_ bytes: [UInt8], volume: String, file: String) throws(BackendError) -> VolumeRecord {
        var values: [Substring: UInt64] = [:]
        guard let text = String(validating: bytes, as: UTF8.self) else { throw damaged(file, "it is not text") }
        for line in text.split(whereSeparator: \.isNewline) where !line.hasPrefix("#") {
            let parts = line.split(separator: "=", maxSplits: 1)
            guard parts.count == 2 else { throw damaged(file, "line '\(line.prefix(64))' is not key = value") }
            let key = parts[0].trimmingBlanks
            let value = parts[1].trimmingBlanks
            let number = value.hasPrefix("0x") ? UInt64(value.dropFirst(2), radix: 16) : UInt64(value)
            guard let number else { throw damaged(file, "the value of \(key.prefix(64)) is not a number") }
            values[key] = number
        }
        func value(_ key: Substring) throws(BackendError) -> UInt64 {
            guard let value = values[key] else { throw damaged(file, "\(key) is missing") }
            return value
        }
        let found = try value("version")
        guard found == version else {
            throw BackendError(code: 95, message: "\(file): version \(found) of the description; a newer qbd wrote it")
        }
        let blockSize = try value("block_size")
        let size = try value("size")
        guard blockSize == 512 || blockSize == 4096, size > 0, size % blockSize == 0, size <= UInt64(Int64.max) else {
            throw damaged(file, "size \(size) and block_size \(blockSize) do not fit")
        }
        return VolumeRecord(
            id: try value("id"), volume: volume, size: size, blockSize: UInt32(blockSize),
            created: Int64(clamping: try value("created")))
    }

    private static func damaged(_ file: String, _ what: String) -> BackendError {
        BackendError(
            code: 5, message: "\(file) is damaged: \(what); restore it, or move it and the .raw file away")
    }
}

extension Substring {
    fileprivate var trimmingBlanks: Substring {
        var rest = drop { $0 == " " || $0 == "\t" }
        while let last = rest.last, last == " " || last == "\t" || last == "\r" { rest.removeLast() }
        return rest
    }
}
