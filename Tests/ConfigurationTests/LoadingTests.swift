import Configuration
import Glibc
import Testing

@Suite("qbd.conf: reading the file")
struct LoadingTests {
    /// Runs `body` with the path of a new directory, which is removed afterwards.
    private func withDirectory(_ body: (String) throws -> Void) throws {
        var template = Array("/tmp/qbd-configuration-XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        let directory = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        defer {
            unlink(directory + "/qbd.conf")
            rmdir(directory)
        }
        try body(directory)
    }

    private func write(_ bytes: [UInt8], to path: String) throws {
        let file = try #require(fopen(path, "w"))
        #expect(fwrite(bytes, 1, bytes.count, file) == bytes.count)
        #expect(fclose(file) == 0)
    }

    private func loadFailure(_ path: String) throws -> ConfigurationError {
        try #require(#expect(throws: ConfigurationError.self) { try DaemonConfiguration.load(path: path) })
    }

    @Test("A file is read from its path, which then stands in the texts")
    func load() throws {
        try withDirectory { directory in
            let path = directory + "/qbd.conf"
            try write(Array("[client]\nio_depth=5\nx=y\n".utf8), to: path)
            let configuration = try DaemonConfiguration.load(path: path)
            #expect(configuration.client.ioDepth == 5)
            #expect(configuration.file == path)
            #expect(configuration.warnings == ["\(path):3: unknown key 'x' in section [client] is ignored"])
        }
    }

    @Test("A file larger than one read is read whole, up to 1 MiB and no further")
    func sizes() throws {
        try withDirectory { directory in
            let path = directory + "/qbd.conf"
            let end = Array("[client]\nio_depth=5".utf8)
            let blank = [UInt8](repeating: 0x0A, count: (1 << 20) - end.count)
            try write(blank + end, to: path)
            #expect(try DaemonConfiguration.load(path: path).client.ioDepth == 5)
            try write(blank + end + [0x0A], to: path)
            #expect(
                try loadFailure(path).description
                    == "\(path): the file is larger than 1 MiB; is it really a configuration file?")
        }
    }

    @Test("A missing file is an error that says so, with its errno")
    func missing() throws {
        try withDirectory { directory in
            let error = try loadFailure(directory + "/qbd.conf")
            #expect(
                error.description == "\(directory)/qbd.conf: cannot read the configuration: No such file or directory;"
                    + " create it, or name another with --config")
            #expect(error.systemError == ENOENT)
        }
    }

    @Test("A directory and a FIFO are no configuration, and nothing hangs")
    func notAFile() throws {
        try withDirectory { directory in
            let error = try loadFailure(directory)
            #expect(error.description == "\(directory): cannot read the configuration: not a regular file")
            #expect(error.systemError == EISDIR)

            let fifo = directory + "/qbd.conf"
            #expect(mkfifo(fifo, 0o600) == 0)
            #expect(try loadFailure(fifo).systemError == EINVAL)
        }
    }

    @Test("A path with a NUL byte is refused, not cut short")
    func pathWithNUL() throws {
        #expect(try loadFailure("/etc/passwd\0.conf").message == "the path '/etc/passwd\\u{0}.conf' holds a NUL byte")
    }
}
