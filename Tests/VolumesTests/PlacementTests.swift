import Backend
import EventLoop
import Glibc
import LocalPool
import NBD
import Synchronization
import Testing
import Volumes

/// Volumes in memory receive large payloads where they keep them, while other clients' requests are done; see
/// `Backend.placement`.
@Suite(.timeLimit(.minutes(1))) struct PlacementTests {
    private static let writeLength: UInt32 = 128 << 10
    private static let size: UInt32 = 1 << 20
    /// In the middle of what arrives behind the zeroing, and not all of any piece that has a mark.
    private static let stretch: (offset: UInt32, length: UInt32) = (51_200, 4096)

    @Test(arguments: [Command.trim, .writeZeroes], [true, false])
    func whatArrivesBehindAZeroingCanBeZeroed(with command: Command, whenTheWriteIsCutOff isCutOff: Bool) async throws {
        let connections = Mutex(0)
        let report = { @Sendable (event: SessionEvent) in
            if case .sessions(let now) = event { connections.withLock { $0 = now } }
        }
        let pool = MemoryPool(name: "pool")
        _ = try pool.create(volume: "volume", size: UInt64(Self.size), blockSize: 512)
        let opened = try pool.open(volume: "volume", readOnly: false)
        try await withMappedVolume(opened, report: report) { volume in
            let writer = try Client(volume)
            let other = try Client(volume)
            writer.send(.write, offset: 0, length: Self.writeLength)
            // It gets its place when the second piece is received.
            for count in [30_000, 20_000] { writer.sendPayload(count) }
            other.send(command, offset: 0, length: Self.size)
            other.expectDone()
            #expect(other.firstExtent(Self.size) == (Self.size, Extent.holeAndZero), "all was zeroed")
            writer.sendPayload(20_000)
            #expect(other.firstExtent(Self.size).flags == 0, "some has arrived since")
            if isCutOff {
                writer.leave()
                await waitUntil { connections.withLock { $0 } == 1 }
            } else {
                writer.sendPayload(Int(Self.writeLength) - 70_000)
                writer.expectDone()
            }
            #expect(other.firstExtent(Self.size).flags == 0)
            let arrived = other.read(Self.stretch.offset, Self.stretch.length)
            try #require(arrived == [UInt8](repeating: Client.mark, count: Int(Self.stretch.length)))
            other.send(command, offset: Self.stretch.offset, length: Self.stretch.length)
            other.expectDone()
            let isZeroed = other.read(Self.stretch.offset, Self.stretch.length).allSatisfy { $0 == 0 }
            #expect(isZeroed, "zeroing was answered, and the bytes are still there")
        }
    }
}

/// Has one request at a time, and waits for its structured reply.
private final class Client {
    static let mark: UInt8 = 0xaa
    private static let data: UInt16 = 1
    private static let status: UInt16 = 5
    private var socket: Int32

    init(_ volume: Volume) throws {
        let pair = try SocketPair.make(count: 1)[0]
        socket = pair.kernel
        volume.attach(
            descriptor: pair.server, peer: "unix",
            negotiated: Negotiated(export: volume.export, structured: true, baseAllocation: true), leftover: [])
    }

    deinit { leave() }

    func leave() {
        if socket >= 0 { close(socket) }
        socket = -1
    }

    func send(_ command: Command, offset: UInt32, length: UInt32) {
        var bytes: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, UInt8(command.rawValue)]
        bytes += [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        for value in [offset, length] { withUnsafeBytes(of: value.bigEndian) { bytes += $0 } }
        send(bytes)
    }

    /// Sends a part of the payload, and waits until it is taken in.
    func sendPayload(_ count: Int) {
        send([UInt8](repeating: Self.mark, count: count))
        var unread: Int32 = 0
        repeat {
            usleep(1000)
            #expect(ioctl(socket, UInt(TIOCOUTQ), &unread) == 0)
        } while unread > 0
    }

    /// Such a reply is a simple one, as it may be.
    func expectDone() {
        #expect(receive(16, from: socket) == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    }

    func read(_ offset: UInt32, _ length: UInt32) -> [UInt8] {
        send(.read, offset: offset, length: length)
        return Array(reply(Self.data)?.dropFirst(8) ?? [])
    }

    /// Of all that there is.
    func firstExtent(_ length: UInt32) -> (length: UInt32, flags: UInt32) {
        send(.blockStatus, offset: 0, length: length)
        guard let content = reply(Self.status), content.count >= 12 else { return (0, .max) }
        return (Self.number(content[4..<8]), Self.number(content[8..<12]))
    }

    private func send(_ bytes: [UInt8]) {
        #expect(Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count)
    }

    /// - Returns: the content of a chunk of this type, the only one; nil for anything else.
    private func reply(_ type: UInt16) -> [UInt8]? {
        let head = receive(20, from: socket)
        guard head.count == 20 else { return nil }
        let content = receive(Int(Self.number(head[16...])), from: socket)
        return Self.number(head[6..<8]) == UInt32(type) ? content : nil
    }

    private static func number(_ bytes: ArraySlice<UInt8>) -> UInt32 { bytes.reduce(0) { $0 << 8 | UInt32($1) } }
}
