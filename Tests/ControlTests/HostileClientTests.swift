import Control
import Glibc
import Testing

@Suite("Control socket against hostile clients", .serialized, .timeLimit(.minutes(4)))
struct HostileClientTests {
    /// The server is well: another client gets its answer.
    private func checkHealth(_ fixture: Fixture) async throws {
        _ = try await fixture.client.send(VersionRequest())
    }

    @Test("an unknown path is 404, another method 405, both in JSON")
    func wrongAddress() async throws {
        try await Fixture.with { fixture in
            for path in ["/", "/v1/QBD_IOC_MOP_VOLUME", "/v1/QBD_IOC_MAP_VOLUME/x", "/v9/QBD_IOC_MAP_VOLUME"] {
                let answer = try await fixture.post(path, "{}")
                #expect(answer.hasPrefix("HTTP/1.1 404 "), "\(answer)")
                #expect(answer.contains(#"{"error":{"code":38,"#), "\(answer)")
            }
            for method in ["GET", "PUT", "DELETE", "OPTIONS"] {
                let answer = try await fixture.ask("\(method) \(Command.list.path) HTTP/1.1\r\nhost: x\r\n\r\n")
                #expect(answer.hasPrefix("HTTP/1.1 405 "), "\(answer)")
                #expect(answer.contains("allow: POST"), "\(answer)")
                #expect(answer.contains(#""code":22"#), "\(answer)")
            }
        }
    }

    @Test(
        "a body that is not the command's question is refused with code 22",
        arguments: [
            "", "{", "[]", "null", "1", "\u{0}\u{1}", #"{"volume":1,"config":"/c"}"#, #"{"volume":"a/b"}"#,
            #"{"volume":"a/b","config":"/c","size":-1,"block_size":512}"#,
            #"{"volume":"a/b","config":"/c","size":1e99,"block_size":512}"#,
            #"{"volume":"a/b","config":"/c","size":1,"block_size":5000000000}"#,
            String(repeating: "[", count: 100_000),
        ])
    func badBody(body: String) async throws {
        try await Fixture.with { fixture in
            let answer = try await fixture.post(Command.create.path, body)
            #expect(answer.hasPrefix("HTTP/1.1 400 "), "\(answer)")
            #expect(answer.contains(#""code":22"#), "\(answer)")
            #expect(fixture.service.requests == [])
        }
    }

    @Test(
        "what is not HTTP is answered with 400 and closed",
        arguments: [
            "hello\r\n\r\n", "\u{0}\u{0}\u{0}\u{0}", "NBDMAGICIHAVEOPT", "POST\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "POST / HTTP/1.1\r\n: x\r\n\r\n",
        ])
    func garbage(text: String) async throws {
        try await Fixture.with { fixture in
            let answer = try await fixture.ask(text)
            #expect(answer.hasPrefix("HTTP/1.1 400 "), "\(answer)")
            try await checkHealth(fixture)
        }
    }

    @Test("random bytes neither crash nor confuse it")
    func random() async throws {
        try await Fixture.with { fixture in
            var generator = SystemRandomNumberGenerator()
            for _ in 0..<200 {
                let bytes = (0..<Int.random(in: 1...3000, using: &generator)).map { _ in
                    UInt8.random(in: 0...255, using: &generator)
                }
                let client = try RawClient(fixture.folder.socket)
                let ended = await onThread {
                    client.send(bytes)
                    client.closeInput()
                    return client.readToEnd() != nil
                }
                #expect(ended, "the connection was not closed")
            }
            try await checkHealth(fixture)
        }
    }

    @Test("a header without end is cut off")
    func hugeHeader() async throws {
        try await Fixture.with { fixture in
            let line = "x-filler: " + String(repeating: "y", count: 1000) + "\r\n"
            let many = String(repeating: "a: b\r\n", count: 100_000)
            for header in [
                String(repeating: line, count: 10_000), "x: " + String(repeating: "y", count: 10_000_000), many,
            ] {
                let answer = try await fixture.ask("POST \(Command.list.path) HTTP/1.1\r\n" + header)
                #expect(answer.hasPrefix("HTTP/1.1 431 "), "\(answer)")
            }
            try await checkHealth(fixture)
        }
    }

    @Test("a request line without end is cut off")
    func hugeLine() async throws {
        var limits = ControlServer.Limits()
        limits.request = .milliseconds(500)
        try await Fixture.with(limits) { fixture in
            let answer = try await fixture.ask("POST /" + String(repeating: "x", count: 10_000_000))
            #expect(answer.hasPrefix("HTTP/1.1 4"), "\(answer)")
            try await checkHealth(fixture)
        }
    }

    @Test("a body over 1 MiB is refused when it is announced, and when it comes in pieces")
    func hugeBody() async throws {
        try await Fixture.with { fixture in
            let head = "POST \(Command.map.path) HTTP/1.1\r\nhost: x\r\n"
            let announced = try await fixture.ask(head + "content-length: 1048577\r\n\r\n")
            #expect(announced.hasPrefix("HTTP/1.1 413 "), "\(announced)")
            #expect(announced.contains(#""code":7"#), "\(announced)")
            let piece = "10000\r\n" + String(repeating: "x", count: 0x10000) + "\r\n"
            let chunked = try await fixture.ask(
                head + "transfer-encoding: chunked\r\n\r\n" + String(repeating: piece, count: 64))
            #expect(chunked.hasPrefix("HTTP/1.1 413 "), "\(chunked)")
            try await checkHealth(fixture)
            #expect(fixture.reports.all.count == 2, "each is reported with one line: \(fixture.reports.all)")
        }
    }

    @Test("a body of exactly 1 MiB is read")
    func largestBody() async throws {
        try await Fixture.with { fixture in
            let json = #"{"volume":"a/b","config":"/c","export":true,"read_only":false}"#
            let answer = try await fixture.post(
                Command.map.path, json + String(repeating: " ", count: (1 << 20) - json.utf8.count))
            #expect(answer.hasPrefix("HTTP/1.1 200 "), "\(answer)")
        }
    }

    @Test("half a request, then the end: closed, nothing done")
    func halfRequest() async throws {
        try await Fixture.with { fixture in
            let body = #"{"volume":"a/b","config":"/c"}"#
            let whole =
                "POST \(Command.delete.path) HTTP/1.1\r\nhost: x\r\ncontent-length: \(body.utf8.count)\r\n\r\n\(body)"
            for length in stride(from: 0, to: whole.utf8.count, by: 3) {
                let client = try RawClient(fixture.folder.socket)
                let answer = await onThread {
                    client.send(Array(whole.utf8.prefix(length)))
                    client.closeInput()
                    return client.readToEnd()
                }
                #expect(answer == "" || answer?.hasPrefix("HTTP/1.1 400 ") == true, "\(answer ?? "not closed")")
            }
            #expect(fixture.service.requests == [], "half a request must do nothing")
            try await checkHealth(fixture)
        }
    }

    @Test("a client that closes its side behind its request still gets its answer")
    func halfClose() async throws {
        try await Fixture.with { fixture in
            let client = try RawClient(fixture.folder.socket)
            let answer = await onThread {
                client.send("POST \(Command.version.path) HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
                client.closeInput()
                return client.readToEnd()
            }
            #expect(answer?.hasPrefix("HTTP/1.1 200 ") == true, "\(answer ?? "not closed")")
        }
    }

    @Test("requests behind the first on one connection are not read")
    func pipelined() async throws {
        try await Fixture.with { fixture in
            let one = "POST \(Command.version.path) HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
            let answer = try await fixture.ask(String(repeating: one, count: 1000))
            #expect(answer.components(of: "HTTP/1.1 ") == 1, "\(answer.prefix(300))")
            try await checkHealth(fixture)
        }
    }

    @Test("clients that send one byte at a time, or nothing, delay nobody")
    func slow() async throws {
        var limits = ControlServer.Limits()
        limits.request = .seconds(600)
        try await Fixture.with(limits) { fixture in
            var slow: [RawClient] = []
            for _ in 0..<20 { slow.append(try RawClient(fixture.folder.socket)) }
            for byte in "POST \(Command.list.path) HTTP/1.1\r\nx: y".utf8 {
                // Half of them send nothing at all.
                for index in 0..<10 { slow[index].send([byte]) }
                // Were one served only behind the slow, this would end in 20 s with code 110.
                try await checkHealth(fixture)
            }
            let open = slow.count { $0.isOpen }
            #expect(open == 20, "they have their time")
        }
    }

    @Test("clients that send one byte at a time, or nothing, are cut off in time")
    func tooSlow() async throws {
        var limits = ControlServer.Limits()
        limits.request = .milliseconds(300)
        try await Fixture.with(limits) { fixture in
            for trickle in [true, false] {
                let client = try RawClient(fixture.folder.socket)
                let answer = await onThread {
                    // A byte every 20 ms, until nobody takes it any more.
                    for byte in ("POST /" + String(repeating: "y", count: 9000)).utf8 where trickle {
                        guard client.send([byte]) else { break }
                        usleep(20_000)
                    }
                    return client.readToEnd()
                }
                #expect(answer?.hasPrefix("HTTP/1.1 408 ") == true, "\(answer ?? "not closed")")
                #expect(answer?.contains(#""code":110"#) == true, "\(answer ?? "not closed")")
            }
            #expect(fixture.reports.all.count == 2, "each is reported with one line: \(fixture.reports.all)")
        }
    }

    @Test("a client that does not read its answer is dropped")
    func deaf() async throws {
        var limits = ControlServer.Limits()
        limits.answer = .milliseconds(300)
        try await Fixture.with(limits) { fixture in
            fixture.service.setMappings(Array(repeating: .example, count: 20_000))
            let client = try RawClient(fixture.folder.socket)
            client.send("POST \(Command.list.path) HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            // Wait without reading until the server has closed: then sending fails.
            let dropped = await onThread {
                for _ in 0..<1000 {
                    if !client.send(" ") { return true }
                    usleep(10_000)
                }
                return false
            }
            #expect(dropped, "the server still holds a client that reads nothing")
            let answer = await onThread { client.readToEnd() }
            #expect((answer?.utf8.count ?? .max) < 8_000_000, "the answer cannot have been complete")
        }
    }

    @Test("more connections than allowed are told so, and room comes back")
    func crowd() async throws {
        var limits = ControlServer.Limits()
        limits.connections = 10
        try await Fixture.with(limits) { fixture in
            var crowd: [RawClient] = []
            for _ in 0..<10 { crowd.append(try RawClient(fixture.folder.socket)) }
            let client = fixture.client
            let error = await #expect(throws: ControlError.self) { try await client.send(VersionRequest()) }
            #expect(error?.code == 11)
            crowd = []
            // Closing is noticed on the server's thread, in its own time.
            var answered = false
            for _ in 0..<1000 where !answered {
                answered = (try? await client.send(VersionRequest())) != nil
            }
            #expect(answered)
        }
    }

    @Test("10,000 clients leave no descriptor behind")
    func descriptors() async throws {
        try await Fixture.with { fixture in
            try await checkHealth(fixture)
            let path = fixture.folder.socket
            let connected = await onThread {
                (0..<10_000).allSatisfy { _ in (try? RawClient(path))?.send("POST /") ?? false }
            }
            #expect(connected)
            try await checkHealth(fixture)
            var open = Int.max
            for _ in 0..<1000 where open > 0 {
                open = fixture.folder.connections()
                try await checkHealth(fixture)
            }
            #expect(open <= 1, "\(open) connections of this server are still open")
        }
    }
}

extension String {
    func components(of part: String) -> Int {
        var count = 0
        var rest = self[...]
        while let range = rest.firstRange(of: part) {
            count += 1
            rest = rest[range.upperBound...]
        }
        return count
    }
}

extension TemporaryFolder {
    /// Accepted connections of the server at `socket`, as the kernel lists them.
    func connections() -> Int {
        guard let file = fopen("/proc/net/unix", "r") else { return 0 }
        defer { fclose(file) }
        var count = 0
        var line: UnsafeMutablePointer<CChar>?
        var room = 0
        defer { free(line) }
        while getline(&line, &room, file) > 0 {
            guard let line else { break }
            // The fields of /proc/net/unix: the sixth is the state, 03 is connected.
            let fields = String(cString: line).split(whereSeparator: \.isWhitespace)
            if fields.count == 8, fields[7].hasSuffix(socket + "~") || fields[7].hasSuffix(socket), fields[5] == "03" {
                count += 1
            }
        }
        return count
    }
}
