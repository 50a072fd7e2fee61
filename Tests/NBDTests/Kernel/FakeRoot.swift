import Glibc
import Testing

/// A folder that stands for `/`, with the files of /sys, /proc and /dev that a test needs.
final class FakeRoot {
    let path: String

    init() throws {
        var template = Array("/tmp/qbd-root-XXXXXX".utf8CString)
        path = try #require(mkdtemp(&template).map { String(cString: $0) })
        // What is always there.
        folder("/sys/block")
        write("/proc/self/mountinfo", "")
    }

    /// In place of a file: what cannot be read, and is there. (EISDIR; that of a folder is ENOTDIR.)
    func spoil(_ name: String) {
        delete(name)
        folder(name)
    }

    deinit { remove(path) }

    private func remove(_ path: String) {
        var status = stat()
        guard lstat(path, &status) == 0 else { return }
        guard status.st_mode & S_IFMT == S_IFDIR else {
            unlink(path)
            return
        }
        for name in names(of: path) { remove("\(path)/\(name)") }
        rmdir(path)
    }

    private func names(of folder: String) -> [String] {
        guard let directory = opendir(folder) else { return [] }
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    /// Names in a folder, sorted.
    func list(_ folder: String) -> [String] { names(of: path + folder) }

    func folder(_ name: String) {
        var full = path
        for part in name.split(separator: "/") {
            full += "/\(part)"
            mkdir(full, 0o755)
        }
    }

    private func parent(_ name: String) {
        folder(name.split(separator: "/").dropLast().joined(separator: "/"))
    }

    func write(_ name: String, _ text: String, mode: mode_t = 0o644) {
        parent(name)
        let file = fopen(path + name, "w")
        fwrite(text, 1, text.utf8.count, file)
        fclose(file)
        chmod(path + name, mode)
    }

    func link(_ name: String, _ target: String) {
        parent(name)
        symlink(target, path + name)
    }

    func delete(_ name: String) { remove(path + name) }

    func text(_ name: String) -> String? {
        guard let file = fopen(path + name, "r") else { return nil }
        defer { fclose(file) }
        var text = ""
        while case let byte = fgetc(file), byte != EOF { text.unicodeScalars.append(Unicode.Scalar(UInt8(byte))) }
        return text
    }

    func target(_ name: String) -> String? {
        var buffer = [CChar](repeating: 0, count: 4096)
        guard readlink(path + name, &buffer, buffer.count - 1) >= 0 else { return nil }
        return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// A connected device as the driver shows it. Its node is there already, as nobody but root can make one.
    func device(_ index: Int, backend: String? = nil, sectors: UInt64 = 2048, partitions: [Int] = []) {
        let folder = "/sys/block/nbd\(index)"
        write("\(folder)/size", "\(sectors)\n")
        write("\(folder)/dev", "43:\(index * 32)\n")
        write("\(folder)/ro", "0\n")
        write("\(folder)/inflight", "       0        0\n")
        write("\(folder)/pid", "4242\n")
        self.folder("\(folder)/holders")
        if let backend { write("\(folder)/backend", "\(backend)\n") }
        write("/dev/nbd\(index)", "")
        for number in partitions {
            write("\(folder)/nbd\(index)p\(number)/partition", "\(number)\n")
            write("\(folder)/nbd\(index)p\(number)/dev", "43:\(index * 32 + number)\n")
            self.folder("\(folder)/nbd\(index)p\(number)/holders")
            write("/dev/nbd\(index)p\(number)", "")
        }
    }

    func disconnect(_ index: Int) {
        for file in ["pid", "backend"] { delete("/sys/block/nbd\(index)/\(file)") }
        write("/sys/block/nbd\(index)/size", "0\n")
    }
}
