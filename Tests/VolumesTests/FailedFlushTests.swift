import Backend
import EventLoop
import Glibc
import NBD
import Synchronization
import Testing
import Volumes

/// Nobody hears of a failed flush before it is written down that all later ones fail.
@Suite(.timeLimit(.minutes(1))) struct FailedFlushTests {
    @Test func theAnswerWaitsUntilItIsWrittenDown() async throws {
        let written = Mutex<[@Sendable () -> Void]>([])
        try await withMappedVolume(
            of: FailingBackend(),
            report: { event in
                if case .flushesFail(_, let done) = event { written.withLock { $0.append(done) } }
            }
        ) { volume in
            let socket = try Self.attach(volume)
            defer { close(socket) }
            Self.flush(socket)
            await waitUntil { written.withLock { !$0.isEmpty } }
            #expect(Self.unread(socket) < 16)
            #expect(volume.flushesFailSince != nil)
            written.withLock { $0.removeFirst() }()
            #expect(receive(16, from: socket)[4..<8] == [0, 0, 0, UInt8(EIO)])
            // The next one is answered at once, and tells nobody again.
            Self.flush(socket)
            #expect(receive(16, from: socket)[4..<8] == [0, 0, 0, UInt8(EIO)])
            #expect(written.withLock { $0.isEmpty })
        }
    }

    /// A state folder that does not answer holds up no client for ever.
    @Test func theAnswerDoesNotWaitForEver() async throws {
        try await withMappedVolume(of: FailingBackend()) { volume in
            let socket = try Self.attach(volume)
            defer { close(socket) }
            Self.flush(socket)
            #expect(receive(16, from: socket).count == 16)
        }
    }

    private static func attach(_ volume: Volume) throws -> Int32 {
        var ends: [Int32] = [-1, -1]
        try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_NONBLOCK.rawValue), 0, &ends) == 0)
        let negotiated = Negotiated(export: volume.export, structured: false, baseAllocation: false)
        volume.attach(descriptor: ends[1], peer: "test", negotiated: negotiated, leftover: [])
        return ends[0]
    }

    private static func flush(_ socket: Int32) {
        // NBD protocol, "Request message": magic, flags, type 3, cookie, offset, length.
        let request: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3] + [UInt8](repeating: 0, count: 20)
        #expect(write(socket, request, request.count) == request.count)
    }

    private static func unread(_ socket: Int32) -> Int {
        var bytes = [UInt8](repeating: 0, count: 64)
        return max(recv(socket, &bytes, bytes.count, Int32(MSG_PEEK | MSG_DONTWAIT)), 0)
    }
}

/// Its flushes fail from the first one on.
private final class FailingBackend: TestBackend, @unchecked Sendable {
    private weak var client: (any BackendClient)?
    private var hasFailed = false
    let geometry = Geometry(size: 1 << 20, blockSize: 512)

    func start(_ loop: EventLoop, _ client: any BackendClient) { self.client = client }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        if !hasFailed { client?.flushesFail() }
        hasFailed = true
        io.pointee.status = EIO
        client?.completed(io)
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }
    func resized(to size: UInt64) {}
    func close() {}
}
