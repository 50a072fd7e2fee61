import Control
import Glibc
import Testing

@Suite("Asking a daemon that is not there", .timeLimit(.minutes(1)))
struct ControlClientTests {
    private func error(
        at path: String, timeout: Duration = .seconds(20)
    ) async -> ControlError? {
        await #expect(throws: ControlError.self) {
            try await ControlClient(path: path, timeout: timeout).send(VersionRequest())
        }
    }

    @Test("no socket: 111, and how to start it")
    func notRunning() async throws {
        let folder = try TemporaryFolder()
        let error = await error(at: folder.socket)
        #expect(error?.code == 111)
        #expect(error?.message.hasPrefix("qbdd is not running (no socket at \(folder.socket)); start it with") == true)
    }

    @Test("a socket where nobody listens: 111")
    func stale() async throws {
        let folder = try TemporaryFolder()
        do { _ = try Peer(folder.socket) }
        let error = await error(at: folder.socket)
        #expect(error?.code == 111)
        #expect(error?.message.contains("nobody listens at \(folder.socket)") == true)
    }

    @Test("a file that is no socket: 88")
    func noSocket() async throws {
        let error = await error(at: "/etc/passwd")
        #expect(error?.code == 88)
        #expect(error?.message.contains("is not a socket") == true)
    }

    @Test("an empty or long path: 22", arguments: ["", "/" + String(repeating: "x", count: 108)])
    func badPath(path: String) async {
        let error = await error(at: path)
        #expect(error?.code == 22)
    }

    @Test(
        "something else answers: 71, and which option names the right socket",
        arguments: [
            "NBDMAGICIHAVEOPT\u{0}\u{3}", "220 mail ESMTP\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 404 Not Found\r\nserver: nginx\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 500 Oops\r\nserver: qbdd/9\r\ncontent-length: 2\r\n\r\n[]",
        ])
    func wrongSocket(greeting: String) async throws {
        let folder = try TemporaryFolder()
        let peer = try Peer(folder.socket)
        async let served: Void = peer.serve(greeting)
        let error = await error(at: folder.socket)
        #expect(error?.code == 71)
        #expect(error?.message.contains("what answers at \(folder.socket) is not qbdd") == true)
        #expect(error?.message.contains("--socket") == true)
        await served
    }

    @Test("an answer of another version that cannot be read: 71, and which version it was")
    func otherVersion() async throws {
        let folder = try TemporaryFolder()
        let peer = try Peer(folder.socket)
        async let served: Void = peer.serve("HTTP/1.1 200 OK\r\nserver: qbdd/9.9\r\ncontent-length: 2\r\n\r\n{}")
        let error = await error(at: folder.socket)
        #expect(error?.code == 71)
        #expect(error?.message.contains("qbdd/9.9") == true)
        await served
    }

    @Test(
        "closed before the answer was complete: 104",
        arguments: ["", "HTTP/1.1 200 OK\r\nserver: qbdd/9\r\ncontent-length: 20\r\n\r\n{}"])
    func closed(greeting: String) async throws {
        let folder = try TemporaryFolder()
        let peer = try Peer(folder.socket)
        async let served: Void = peer.serve(greeting)
        let error = await error(at: folder.socket)
        #expect(error?.code == 104)
        await served
    }

    @Test("no answer in time: 110")
    func timeOut() async throws {
        let folder = try TemporaryFolder()
        let peer = try Peer(folder.socket)
        async let served: Void = peer.serve(nil)
        let error = await error(at: folder.socket, timeout: .milliseconds(100))
        #expect(error?.code == 110)
        #expect(error?.message.contains("did not answer within 0.1 seconds") == true)
        await served
    }
}
