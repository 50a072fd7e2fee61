import Backend
import EventLoop
import Glibc
import NBD
import Synchronization
import Testing
import Volumes

/// Large writes of a client that is waited for alone: their payload is waited for in its place; see `StreamInput` and
/// `ExclusiveWait`.
@Suite(.timeLimit(.minutes(2))) struct LargeWriteTests {
    @Test(arguments: [true, false]) func whatElseHappensInTheMiddleOfAPayloadIsNotHeldUp(atPlace: Bool) async throws {
        let backend = WriteBackend(atPlace: atPlace)
        try await withMappedVolume(of: backend) { volume in
            let client = try Writer(volume)
            let other = try Writer(volume)
            // The loop may be interrupted at any time, by a timer of its own if nothing else; then another write has to do.
            for turn in 1...50 {
                for _ in 0..<100 { client.write(UInt8(turn)) }
                client.begin(UInt8(turn))
                let isAlone = backend.wasAlone
                #expect(await volume.status() != nil)
                other.write(0xee, offset: 512 << 10)
                client.finish(UInt8(turn))
                #expect(backend.content(0) == [UInt8](repeating: UInt8(turn), count: Writer.length))
                #expect(backend.content(512 << 10) == [UInt8](repeating: 0xee, count: Writer.length))
                if isAlone { return }
            }
            Issue.record("no payload was waited for alone")
        }
    }

    @Test(arguments: [true, false]) func aClientThatLeavesInTheMiddleOfAPayloadIsNoticed(atPlace: Bool) async throws {
        let count = Mutex(0)
        let report = { @Sendable (event: SessionEvent) in
            if case .sessions(let now) = event { count.withLock { $0 = now } }
        }
        try await withMappedVolume(of: WriteBackend(atPlace: atPlace), report: report) { volume in
            let client = try Writer(volume)
            for _ in 0..<300 { client.write(1) }
            client.begin(2)
            #expect(count.withLock { $0 } == 1)
            client.leave()
            await waitUntil { count.withLock { $0 } == 0 }
        }
    }
}

/// Keeps what is written, and completes it at once.
private final class WriteBackend: TestBackend, @unchecked Sendable {
    private weak var client: (any BackendClient)?
    private var loop: EventLoop?
    private let atPlace: Bool
    private let data = UnsafeMutableRawPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    private let alone = Atomic(false)
    let geometry = Geometry(size: 1 << 20, blockSize: 512)

    /// - Parameter atPlace: whether payloads may be received where they are kept.
    init(atPlace: Bool) {
        self.atPlace = atPlace
        memset(data, 0, 1 << 20)
    }

    deinit { data.deallocate() }

    func start(_ loop: EventLoop, _ client: any BackendClient) {
        self.loop = loop
        self.client = client
    }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        let place = data + Int(io.pointee.offset)
        if io.pointee.segment.base != place {
            place.copyMemory(from: io.pointee.segment.base, byteCount: Int(io.pointee.length))
        }
        client?.completed(io)
    }

    /// Whether the loop waited for the client of the last large write alone when its payload got its place.
    var wasAlone: Bool { alone.load(ordering: .sequentiallyConsistent) }

    /// After the reply to the write of it.
    func content(_ offset: Int) -> [UInt8] {
        [UInt8](UnsafeRawBufferPointer(start: data + offset, count: Writer.length))
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? {
        alone.store(loop?.waitsExclusively ?? false, ordering: .sequentiallyConsistent)
        return atPlace ? data + Int(offset) : nil
    }

    func resized(to size: UInt64) {}
    func close() {}
}

/// Has one write of `length` bytes at a time, and waits for its reply.
private final class Writer {
    static let length = 128 << 10
    private static let firstPiece = 50_000
    private var socket: Int32

    init(_ volume: Volume) throws {
        let pair = try SocketPair.make(count: 1)[0]
        socket = pair.kernel
        volume.attach(
            descriptor: pair.server, peer: "unix",
            negotiated: Negotiated(export: volume.export, structured: false, baseAllocation: false), leftover: [])
    }

    deinit { leave() }

    func leave() {
        if socket >= 0 { close(socket) }
        socket = -1
    }

    func write(_ byte: UInt8, offset: UInt32 = 0) {
        send(header(offset))
        send([UInt8](repeating: byte, count: Self.length))
        expectReply()
    }

    /// Sends the header and a part of the payload, and waits until they are taken in.
    func begin(_ byte: UInt8) {
        send(header(0))
        send([UInt8](repeating: byte, count: Self.firstPiece))
        var unread: Int32 = 0
        repeat {
            usleep(1000)
            #expect(ioctl(socket, UInt(TIOCOUTQ), &unread) == 0)
        } while unread > 0
    }

    /// Sends the rest, in pieces.
    func finish(_ byte: UInt8) {
        let rest = Self.length - Self.firstPiece
        for count in [1, 4095, rest - 4096] { send([UInt8](repeating: byte, count: count)) }
        expectReply()
    }

    private func header(_ offset: UInt32) -> [UInt8] {
        var bytes: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        for value in [offset, UInt32(Self.length)] { withUnsafeBytes(of: value.bigEndian) { bytes += $0 } }
        return bytes
    }

    private func send(_ bytes: [UInt8]) {
        #expect(Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count)
    }

    private func expectReply() {
        #expect(receive(16, from: socket) == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    }
}
