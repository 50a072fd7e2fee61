import CLinux
import EventLoop
import Glibc

/// Small files of /proc and /sys, whole.
enum TextFile {
    /// Nil when it cannot be read: these files come and go with what they describe.
    static func read(_ path: String) -> String? {
        let descriptor = qbd_open(path, O_RDONLY | O_CLOEXEC, 0)
        guard descriptor >= 0 else { return nil }
        defer { close(descriptor) }
        var bytes: [UInt8] = []
        while true {
            var failed = false
            let chunk = [UInt8](unsafeUninitializedCapacity: 16 << 10) { buffer, count in
                let length = Glibc.read(descriptor, buffer.baseAddress, buffer.count)
                failed = length < 0
                count = max(length, 0)
            }
            if failed { return nil }
            if chunk.isEmpty { return String(decoding: bytes, as: UTF8.self) }
            bytes += chunk
        }
    }

    /// Without the line's end.
    static func readLine(_ path: String) -> String? {
        read(path).map { text in String(text.prefix { $0 != "\n" }) }
    }

    static func write(_ text: String, to path: String) throws(SystemError) {
        let descriptor = try retrying("open \(path)") { qbd_open(path, O_WRONLY | O_CLOEXEC, 0) }
        defer { close(descriptor) }
        try retrying("write '\(text)' to \(path)") { Glibc.write(descriptor, text, text.utf8.count) }
    }

    /// The names in a folder, sorted; none when it cannot be read.
    static func list(_ folder: String) -> [String] {
        guard let stream = opendir(folder) else { return [] }
        defer { closedir(stream) }
        var names: [String] = []
        while let entry = readdir(stream) {
            let name = withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    /// What a symbolic link says; nil when it is none.
    static func link(_ path: String) -> String? {
        var failed = false
        let target = [CChar](unsafeUninitializedCapacity: Int(PATH_MAX)) { buffer, count in
            let length = buffer.baseAddress.map { readlink(path, $0, buffer.count) } ?? -1
            failed = length < 0
            count = max(length, 0)
        }
        return failed ? nil : String(decoding: target.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }
}
