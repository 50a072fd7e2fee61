import Backend
import EventLoop
import Glibc
import NBD
import Synchronization
import Testing
import Volumes

/// A client that has one request at a time gets the first bytes of its reply when the request is taken in; see
/// `Session+Output.swift`.
@Suite(.timeLimit(.minutes(2))) struct EarlyReplyTests {
    @Test(arguments: [true, false], [0, EIO])
    func aReplyThatIsBegunIsTheNextOneThatIsSent(structured: Bool, status: Int32) async throws {
        let backend = PromptBackend()
        try await withMappedVolume(of: backend) { volume in
            let client = try Client(volume, structured: structured)
            client.waitUntilAReplyIsBegun(backend)
            #expect(client.unread == 4)

            // Its answer is a simple reply, and a read's need not be.
            client.send(command: 77, cookie: 7)
            if structured {
                await waitUntil { await volume.status()?.inFlight == 2 }
                #expect(client.unread == 4)
                backend.complete(status: status)
                client.expectRead(status: status)
                client.expectRefusal(cookie: 7)
            } else {
                client.expectRefusal(cookie: 7)
                backend.complete(status: status)
                client.expectRead(status: status)
            }
            client.exchange(10)
        }
    }
}

/// Completes reads at once, or one of them when it is told to.
private final class PromptBackend: TestBackend, @unchecked Sendable {
    private struct State {
        var holds = false
        /// Its address.
        var held: UInt?
    }
    private let state = Mutex(State())
    private var loop: EventLoop?
    private weak var client: (any BackendClient)?
    private let data = UnsafeMutableRawPointer.allocate(byteCount: 512, alignment: 512)
    let geometry = Geometry(size: 1 << 20, blockSize: 512)

    init() { memset(data, 0x5a, 512) }

    deinit { data.deallocate() }

    func start(_ loop: EventLoop, _ client: any BackendClient) {
        self.loop = loop
        self.client = client
    }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        io.pointee.segment.base = data
        io.pointee.segment.count = 512
        let holds = state.withLock { state in
            if state.holds { state.held = UInt(bitPattern: io) }
            return state.holds
        }
        if !holds { client?.completed(io) }
    }

    /// Keeps the next read.
    func hold() { state.withLock { $0.holds = true } }

    var hasOne: Bool { state.withLock { $0.held != nil } }

    func complete(status: Int32) {
        loop?.post { [self] in
            let address = state.withLock { state in
                defer { state = State() }
                return state.held
            }
            guard let io = address.flatMap({ UnsafeMutablePointer<IO>(bitPattern: $0) }) else { return }
            io.pointee.status = status
            client?.completed(io)
        }
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }
    func resized(to size: UInt64) {}
    func close() {}
}

/// Has one read at a time, and waits for its reply.
private final class Client {
    private let socket: Int32
    private let structured: Bool

    init(_ volume: Volume, structured: Bool) throws {
        let pair = try SocketPair.make(count: 1)[0]
        socket = pair.kernel
        self.structured = structured
        volume.attach(
            descriptor: pair.server, peer: "unix",
            negotiated: Negotiated(export: volume.export, structured: structured, baseAllocation: false), leftover: [])
    }

    deinit { close(socket) }

    /// Bytes that have come and were not received.
    var unread: Int32 {
        var count: Int32 = 0
        #expect(ioctl(socket, UInt(FIONREAD), &count) == 0)
        return count
    }

    /// The loop may be interrupted at any time, by a timer of its own if nothing else; then another read has to do.
    func waitUntilAReplyIsBegun(_ backend: PromptBackend) {
        for _ in 0..<50 {
            exchange(300)
            backend.hold()
            send(command: 0, cookie: 1)
            while !backend.hasOne { usleep(1000) }
            if unread > 0 { return }
            backend.complete(status: 0)
            expectRead(status: 0)
        }
        Issue.record("no reply was begun before its read was done")
    }

    func exchange(_ count: Int) {
        for _ in 0..<count {
            // The server sees that this end sleeps, or thinks, in between.
            usleep(50)
            send(command: 0, cookie: 1)
            expectRead(status: 0)
        }
    }

    func send(command: UInt8, cookie: UInt8) {
        var bytes: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, command]
        bytes += [0, 0, 0, 0, 0, 0, 0, cookie, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
        #expect(Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count)
    }

    func expectRead(status: Int32) {
        let cookie: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 1]
        if structured {
            let isError = status != 0
            // An offset and the data, or an error's number and no text.
            let kind: [UInt8] = isError ? [0x80, 1] : [0, 1]
            let length: [UInt8] = isError ? [0, 0, 0, 6] : [0, 0, 2, 8]
            #expect(read(20) == [0x66, 0x8e, 0x33, 0xef, 0, 1] + kind + cookie + length)
            #expect(read(isError ? 6 : 8) == (isError ? [0, 0, 0, 5, 0, 0] : [0, 0, 0, 0, 0, 0, 0, 0]))
        } else {
            #expect(read(16) == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, UInt8(status)] + cookie)
        }
        if status == 0 { #expect(read(512) == [UInt8](repeating: 0x5a, count: 512)) }
    }

    func expectRefusal(cookie: UInt8) {
        #expect(read(16) == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22, 0, 0, 0, 0, 0, 0, 0, cookie])
    }

    private func read(_ count: Int) -> [UInt8] { receive(count, from: socket) }
}
