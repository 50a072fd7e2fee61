import Control
import Glibc
import Synchronization
import Testing

@Suite("Control socket", .timeLimit(.minutes(2)))
struct ControlServerTests {
    @Test("a request reaches the service, its answer the client")
    func answers() async throws {
        try await Fixture.with { fixture in
            let mapping = try await fixture.client.send(
                MapRequest(volume: "a/b", config: "/c", readOnly: true, export: true))
            #expect(mapping.volume == "a/b")
            #expect(mapping.readOnly)
            let created = try await fixture.client.send(
                CreateRequest(volume: "a/b", config: "/c", size: (1 << 63) - 512, blockSize: 4096))
            #expect(created.size == 9_223_372_036_854_775_296)
            let volumes = try await fixture.client.send(VolumesRequest(pool: nil, config: "/c"))
            #expect(volumes.problems.first?.error == ControlError(2, "no folder"))
            let version = try await fixture.client.send(VersionRequest())
            #expect(version.version == ProductVersion.string)
            let list = try await fixture.client.send(ListRequest())
            #expect(list.mappings.isEmpty)
            #expect(
                fixture.service.requests == [
                    "map a/b /c true true", "create a/b /c 9223372036854775296 4096", "volumes * /c",
                ])
        }
    }

    @Test("the service is told who asks")
    func caller() async throws {
        try await Fixture.with { fixture in
            _ = try await fixture.client.send(VersionRequest())
            let caller = try #require(fixture.service.callers.first)
            #expect(caller.user == geteuid())
            var groups = [gid_t](repeating: 0, count: 1 << 16)
            let count = getgroups(CInt(groups.count), &groups)
            #expect(caller.groups == Set(groups.prefix(Int(count))).union([getegid()]))
        }
    }

    @Test("all that info tells survives the wire")
    func info() async throws {
        try await Fixture.with { fixture in
            async let answer = fixture.client.send(InfoRequest(volume: "a/b", config: nil))
            await fixture.service.untilBlocked()
            fixture.service.release()
            let status = try await answer
            #expect(status.mapping == .example)
            #expect(status.counters.writtenBytes == .max)
            #expect(status.latency.flushes.p50 == 0.5)
        }
    }

    @Test("flags that a request leaves out are not set")
    func leftOut() async throws {
        try await Fixture.with { fixture in
            _ = try await fixture.post(Command.map.path, #"{"volume":"a/b","config":"/c"}"#)
            _ = try await fixture.post(Command.unmap.path, #"{"volume":"a/b"}"#)
            _ = try await fixture.post(Command.unmap.path, #"{"volume":"a/b","config":"/c","force":true}"#)
            #expect(
                fixture.service.requests == ["map a/b /c false false", "unmap a/b - false", "unmap a/b /c true"])
        }
    }

    @Test("an error of the service keeps its code and sentence")
    func errors() async throws {
        try await Fixture.with { fixture in
            let client = fixture.client
            let unmap = await #expect(throws: ControlError.self) {
                try await client.send(UnmapRequest(volume: "a/b", config: nil))
            }
            #expect(unmap == ControlError(25, "a/b is not mapped"))
            let delete = await #expect(throws: ControlError.self) {
                try await client.send(DeleteRequest(volume: "a/b", config: "/c"))
            }
            #expect(delete == ControlError(16, "a/b is mapped"))
        }
    }

    @Test("a long list arrives whole")
    func longList() async throws {
        try await Fixture.with { fixture in
            fixture.service.setMappings(Array(repeating: .example, count: 20_000))
            let answer = try await fixture.client.send(ListRequest())
            #expect(answer.mappings.count == 20_000)
        }
    }

    @Test("commands run side by side: one that waits holds up no other")
    func sideBySide() async throws {
        try await Fixture.with { fixture in
            async let waiting = fixture.client.send(InfoRequest(volume: "a/b", config: nil))
            await fixture.service.untilBlocked()
            try await withThrowingTaskGroup(of: Void.self) { group in
                for _ in 0..<200 {
                    group.addTask { _ = try await fixture.client.send(VersionRequest()) }
                }
                try await group.waitForAll()
            }
            fixture.service.release()
            _ = try await waiting
        }
    }

    // MARK: The socket's file

    @Test("the socket has mode 0660, and folders to it are made")
    func mode() async throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/one/two/ctl.sock"
        let server = try await ControlServer(at: ControlPath.reserve(path), service: FakeService(), report: { _ in })
        var status = stat()
        #expect(stat(path, &status) == 0)
        #expect(status.st_mode & 0o777 == 0o660)
        #expect(status.st_mode & S_IFMT == S_IFSOCK)
        await server.stop()
        #expect(folder.names(in: folder.path + "/one/two") == [], "nothing is left when the server has stopped")
    }

    @Test("a second server at the same path is refused, and the first goes on")
    func second() async throws {
        try await Fixture.with { fixture in
            let path = fixture.folder.socket
            let error = await #expect(throws: ControlError.self) {
                try await ControlServer(at: ControlPath.reserve(path), service: FakeService(), report: { _ in })
            }
            #expect(error?.code == 98)
            _ = try await fixture.client.send(VersionRequest())
        }
    }

    @Test("another process's living socket is not taken away")
    func foreign() async throws {
        let folder = try TemporaryFolder()
        let peer = try Peer(folder.socket)
        let error = await #expect(throws: ControlError.self) {
            try await ControlServer(at: ControlPath.reserve(folder.socket), service: FakeService(), report: { _ in })
        }
        #expect(error?.code == 98)
        _ = try RawClient(folder.socket)
        withExtendedLifetime(peer) {}
    }

    @Test("a dead daemon's socket is replaced")
    func stale() async throws {
        let folder = try TemporaryFolder()
        do { _ = try Peer(folder.socket) }
        #expect(folder.names() == ["ctl.sock"])
        let server = try await ControlServer(
            at: ControlPath.reserve(folder.socket), service: FakeService(), report: { _ in })
        _ = try await ControlClient(path: folder.socket).send(VersionRequest())
        await server.stop()
        #expect(folder.names() == [])
    }

    @Test("a file that is no socket is left alone")
    func file() async throws {
        let folder = try TemporaryFolder()
        close(open(folder.socket, O_CREAT | O_WRONLY, 0o600))
        let error = await #expect(throws: ControlError.self) {
            try await ControlServer(at: ControlPath.reserve(folder.socket), service: FakeService(), report: { _ in })
        }
        #expect(error?.code == 17)
        #expect(folder.names() == ["ctl.sock"])
    }

    @Test("a path that is too long is refused")
    func longPath() async throws {
        let path = "/tmp/" + String(repeating: "x", count: 120)
        let error = await #expect(throws: ControlError.self) {
            try await ControlServer(at: ControlPath.reserve(path), service: FakeService(), report: { _ in })
        }
        #expect(error?.code == 22)
    }

    // MARK: The end

    @Test("stopping lets a command that runs end, and answers it")
    func stopWaits() async throws {
        let folder = try TemporaryFolder()
        let service = FakeService()
        let server = try await ControlServer(
            at: ControlPath.reserve(folder.socket), service: service, report: { _ in })
        let idle = try RawClient(folder.socket)
        async let answer = ControlClient(path: folder.socket).send(InfoRequest(volume: "a/b", config: nil))
        await service.untilBlocked()
        async let stopped: Void = server.stop()
        // The idle client's end is the sign that stopping has begun.
        let rest = await onThread { idle.readToEnd() }
        #expect(rest == "")
        service.release()
        let status = try await answer
        #expect(status.mapping == .example)
        await stopped
    }

    @Test("stopping waits for a command whose client has gone", .timeLimit(.minutes(1)))
    func stopWaitsWithoutAClient() async throws {
        let folder = try TemporaryFolder()
        let service = FakeService()
        let server = try await ControlServer(
            at: ControlPath.reserve(folder.socket), service: service, report: { _ in })
        let body = #"{"volume":"a/b"}"#
        var client: RawClient? = try RawClient(folder.socket)
        let length = "content-length: \(body.utf8.count)"
        client?.send("POST \(Command.info.path) HTTP/1.1\r\nhost: x\r\n\(length)\r\n\r\n\(body)")
        await service.untilBlocked()
        client = nil
        let hasEnded = Atomic(false)
        async let hadEnded = {
            await server.stop()
            return hasEnded.load(ordering: .sequentiallyConsistent)
        }()
        // Time for a stop that does not wait to return.
        try await Task.sleep(for: .milliseconds(200))
        hasEnded.store(true, ordering: .sequentiallyConsistent)
        service.release()
        #expect(await hadEnded)
    }

    @Test("stopping waits no longer than its grace for a command that does not end")
    func stopGivesUp() async throws {
        let folder = try TemporaryFolder()
        let service = FakeService()
        let server = try await ControlServer(
            at: ControlPath.reserve(folder.socket), service: service, report: { _ in })
        let asked = Task { try await ControlClient(path: folder.socket).send(InfoRequest(volume: "a/b", config: nil)) }
        await service.untilBlocked()
        await server.stop(grace: .milliseconds(50))
        let error = await #expect(throws: ControlError.self) { try await asked.value }
        #expect(error?.code == 104)
        service.release()
    }
}

extension Fixture {
    /// One request by hand; all that came back.
    func post(_ path: String, _ body: String) async throws -> String {
        try await ask("POST \(path) HTTP/1.1\r\nhost: x\r\ncontent-length: \(body.utf8.count)\r\n\r\n\(body)")
    }

    func ask(_ text: String) async throws -> String {
        let client = try RawClient(folder.socket)
        return try #require(
            await onThread {
                client.send(text)
                return client.readToEnd()
            }, "the connection was not closed")
    }
}
