import CLinux
import EventLoop
import Glibc

/// Small files of /proc and /sys, whole. These come and go with what they describe: nil says that something is not there,
/// and what could not be found out is an error.
enum TextFile {
    /// What these file systems answer for what has gone: a path, a device, a process.
    private static func isAbsence(_ code: Int32) -> Bool {
        code == ENOENT || code == ENODEV || code == ENXIO || code == ESRCH
    }

    /// The value, or nil for what is not there.
    private static func unlessAbsent<Value>(_ body: () throws(SystemError) -> Value) throws(SystemError) -> Value? {
        do throws(SystemError) { return try body() } catch {
            guard isAbsence(error.code) else { throw error }
            return nil
        }
    }

    static func read(_ path: String) throws(SystemError) -> String? {
        try unlessAbsent { () throws(SystemError) in
            let descriptor = try retrying("open \(path)") { qbd_open(path, O_RDONLY | O_CLOEXEC, 0) }
            defer { close(descriptor) }
            var bytes: [UInt8] = []
            var piece = [UInt8](repeating: 0, count: 16 << 10)
            while true {
                let count = try retrying("read \(path)") {
                    piece.withUnsafeMutableBytes { Glibc.read(descriptor, $0.baseAddress, $0.count) }
                }
                if count == 0 { return String(decoding: bytes, as: UTF8.self) }
                bytes += piece.prefix(count)
            }
        }
    }

    /// Without the line's end.
    static func readLine(_ path: String) throws(SystemError) -> String? {
        try read(path).map { text in String(text.prefix { $0 != "\n" }) }
    }

    static func write(_ text: String, to path: String) throws(SystemError) {
        let descriptor = try retrying("open \(path)") { qbd_open(path, O_WRONLY | O_CLOEXEC, 0) }
        defer { close(descriptor) }
        try retrying("write '\(text)' to \(path)") { Glibc.write(descriptor, text, text.utf8.count) }
    }

    /// The names in a folder, sorted; none when it is not there.
    static func list(_ folder: String) throws(SystemError) -> [String] { try listIfThere(folder) ?? [] }

    /// The names in a folder that is always there, sorted.
    static func listAlways(_ folder: String) throws(SystemError) -> [String] {
        guard let names = try listIfThere(folder) else { throw SystemError(code: ENOENT, operation: "read \(folder)") }
        return names
    }

    private static func listIfThere(_ folder: String) throws(SystemError) -> [String]? {
        try unlessAbsent { () throws(SystemError) in
            guard let stream = opendir(folder) else { throw SystemError(code: errno, operation: "open \(folder)") }
            return try readNames(stream, of: folder).sorted()
        }
    }

    /// What a symbolic link says; nil when it is none.
    static func link(_ path: String) throws(SystemError) -> String? {
        var code: Int32 = 0
        let target = [CChar](unsafeUninitializedCapacity: Int(PATH_MAX)) { buffer, count in
            let length = buffer.baseAddress.map { readlink(path, $0, buffer.count) } ?? -1
            if length < 0 { code = errno }
            count = max(length, 0)
        }
        // That of what is something else.
        if isAbsence(code) || code == EINVAL { return nil }
        guard code == 0 else { throw SystemError(code: code, operation: "read the link \(path)") }
        return String(decoding: target.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    static func exists(_ path: String) throws(SystemError) -> Bool {
        try unlessAbsent { () throws(SystemError) in
            try retrying("look at \(path)") { access(path, F_OK) }
        } != nil
    }
}
