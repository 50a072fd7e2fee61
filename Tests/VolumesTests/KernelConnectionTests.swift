import Backend
import EventLoop
import Glibc
import NBD
import Synchronization
import Testing
import Volumes

/// The kernel sends requests of a dead connection again on another, and so does a client that reconnects; see
/// `Volume+Leaving.swift`.
@Suite(.timeLimit(.minutes(1))) struct KernelConnectionTests {
    @Test func requestsSentAgainWaitForTheFirstCopies() async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume)
            first.write(mark: 1)
            await backend.waitUntilBegun([1])
            first.shutDown()
            let second = try KernelEnd(volume)
            second.write(mark: 2)
            second.write(mark: 3)
            await waitUntil { await volume.status()?.inFlight == 3 }
            #expect(backend.begun == [1])
            backend.complete(1)
            await backend.waitUntilBegun([1, 2, 3])
            backend.complete(2)
            backend.complete(3)
            #expect(second.readReplies(2) == [2, 3])
        }
    }

    /// - Parameter peer: nil for the kernel; of other clients, what waits are writes of the same bytes.
    @Test(arguments: [nil, "unix"])
    func whatWasNotBegunOnADeadConnectionNeverBegins(peer: String?) async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume, peer: peer)
            first.write(mark: 1)
            await backend.waitUntilBegun([1])
            first.shutDown()
            let second = try KernelEnd(volume, peer: peer)
            second.write(mark: 2)
            await waitUntil { await volume.status()?.inFlight == 2 }
            second.shutDown()
            await waitUntil { await volume.status()?.inFlight == 1 }
            let third = try KernelEnd(volume, peer: peer)
            third.write(mark: 3)
            await waitUntil { await volume.status()?.inFlight == 2 }
            backend.complete(1)
            await backend.waitUntilBegun([1, 3])
            backend.complete(3)
            #expect(third.readReplies(1) == [3])
        }
    }

    @Test func aConnectionGivenUpIsNotReadWhenAnotherHasTheSecondCopy() async throws {
        try await withVolume { volume, backend in
            let (first, second) = (try KernelEnd(volume), try KernelEnd(volume))
            await waitUntil { await volume.status()?.kernelConnections == 2 }
            // While the loop is busy, all of this happens; it sees the second connection first then.
            backend.blockAt(1)
            second.write(mark: 1)
            await backend.waitUntilBegun([1])
            second.write(mark: 2)
            first.write(mark: 3)
            first.shutDown()
            second.write(mark: 4)
            backend.unblock()
            await backend.waitUntilBegun([1, 2, 4])
            for mark: UInt8 in [1, 2, 4] { backend.complete(mark) }
            #expect(second.readReplies(3) == [1, 2, 4])
            #expect(backend.begun == [1, 2, 4])
        }
    }

    @Test func aStuckConnectionIsGivenUpAfterItsGrace() async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume)
            first.write(mark: 1)
            await backend.waitUntilBegun([1])
            await volume.detachKernel(grace: 0)
            #expect(await volume.status()?.kernelConnections == 0)
            #expect(first.isClosed)
            #expect(await volume.status()?.inFlight == 1)
            backend.complete(1)
            await waitUntil { await volume.status()?.inFlight == 0 }
        }
    }

    /// How a client leaves: a socket that is closed on this host, or over TCP, where the server may only learn that nothing
    /// more comes.
    @Test(arguments: [SHUT_RDWR, SHUT_WR])
    func whatAClientSendsAgainIsNotOvertakenByItsFirstCopy(how: Int) async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume, peer: "unix")
            first.write(mark: 1)
            await backend.waitUntilBegun([1])
            first.shutDown(how)
            let second = try KernelEnd(volume, peer: "unix")
            second.write(mark: 2)
            // What has nothing to do with it goes on.
            second.write(mark: 3, block: 1)
            await backend.waitUntilBegun([1, 3])
            backend.complete(3)
            #expect(second.readReplies(1) == [3])
            #expect(await volume.status()?.inFlight == 2)
            #expect(backend.begun == [1, 3])
            backend.complete(1)
            await backend.waitUntilBegun([1, 3, 2])
            backend.complete(2)
            #expect(second.readReplies(1) == [2])
            second.write(mark: 4)
            await backend.waitUntilBegun([1, 3, 2, 4])
            backend.complete(4)
            #expect(second.readReplies(1) == [4])
        }
    }

    @Test func whatIsUnreadOfALeftConnectionNeverBegins() async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume, peer: "unix")
            // As many as a connection may have in flight, so that the next one is not read.
            let marks = (1...UInt8(Session.maximumInFlight)).map { $0 }
            for mark in marks { first.write(mark: mark, block: 1) }
            await backend.waitUntilBegun(marks)
            first.write(mark: 200)
            first.shutDown(SHUT_WR)
            let second = try KernelEnd(volume, peer: "unix")
            second.write(mark: 201)
            await backend.waitUntilBegun(marks + [201])
            backend.complete(201)
            #expect(second.readReplies(1) == [201])
            for mark in marks { backend.complete(mark) }
            #expect(first.readReplies(marks.count) == marks)
            #expect(first.isClosed)
            second.write(mark: 202)
            await backend.waitUntilBegun(marks + [201, 202])
            backend.complete(202)
            #expect(second.readReplies(1) == [202])
        }
    }

    @Test func connectionsThatAreLeftDoNotWaitForEachOther() async throws {
        try await withVolume { volume, backend in
            let first = try KernelEnd(volume, peer: "unix")
            first.write(mark: 1)
            await backend.waitUntilBegun([1])
            first.shutDown(SHUT_WR)
            let (second, third) = (try KernelEnd(volume, peer: "unix"), try KernelEnd(volume, peer: "unix"))
            second.write(mark: 2)
            await waitUntil { await volume.status()?.inFlight == 2 }
            third.write(mark: 3)
            await waitUntil { await volume.status()?.inFlight == 3 }
            second.write(mark: 4)
            await waitUntil { await volume.status()?.inFlight == 4 }
            second.shutDown(SHUT_WR)
            third.shutDown(SHUT_WR)
            let fourth = try KernelEnd(volume, peer: "unix")
            fourth.write(mark: 5)
            await waitUntil { await volume.status()?.inFlight == 5 }
            backend.complete(1)
            await backend.waitUntilBegun([1, 2, 4])
            backend.complete(4)
            #expect(second.readReplies(1) == [4])
            #expect(backend.begun == [1, 2, 4])
            backend.complete(2)
            await backend.waitUntilBegun([1, 2, 4, 3])
            backend.complete(3)
            await backend.waitUntilBegun([1, 2, 4, 3, 5])
            backend.complete(5)
            #expect(first.readReplies(1) == [1])
            #expect(second.readReplies(1) == [2])
            #expect(third.readReplies(1) == [3])
            #expect(fourth.readReplies(1) == [5])
        }
    }

    @Test func aHandshakeWithAnEarlierMappingIsNotContinued() async throws {
        try await withVolume { earlier, _ in
            try await withVolume { volume, backend in
                let stale = try KernelEnd(volume, peer: "unix", export: earlier.export)
                #expect(stale.isClosed)
                let fresh = try KernelEnd(volume, peer: "unix")
                fresh.write(mark: 1)
                await backend.waitUntilBegun([1])
                backend.complete(1)
                #expect(fresh.readReplies(1) == [1])
            }
        }
    }

    @Test func connectionsThatEndByThemselvesAreReported() async throws {
        let lost = Mutex(0)
        try await withVolume {
            if case .kernelConnectionLost = $0 { lost.withLock { $0 += 1 } }
        } _: { volume, backend in
            let ends = [try KernelEnd(volume), try KernelEnd(volume)]
            await waitUntil { await volume.status()?.kernelConnections == 2 }
            // Also while what it sent is still under way.
            ends[0].write(mark: 1)
            await backend.waitUntilBegun([1])
            ends[0].shutDown()
            await waitUntil { lost.withLock { $0 } == 1 }
            ends[1].shutDown()
            await waitUntil { lost.withLock { $0 } == 2 }
            backend.complete(1)
            let third = try KernelEnd(volume)
            await waitUntil { await volume.status()?.kernelConnections == 1 }
            await volume.severKernel()
            #expect(third.isClosed)
        }
        #expect(lost.withLock { $0 } == 2)
    }

    @Test func aDeviceThatIsNotDisconnectedAfterAllKeepsItsConnections() async throws {
        let lost = Mutex(0)
        try await withVolume {
            if case .kernelConnectionLost = $0 { lost.withLock { $0 += 1 } }
        } _: { volume, _ in
            let ends = [try KernelEnd(volume), try KernelEnd(volume)]
            await waitUntil { await volume.status()?.kernelConnections == 2 }
            await volume.expectKernelToLeave()
            ends[0].shutDown()
            await waitUntil { await volume.status()?.kernelConnections == 1 }
            #expect(lost.withLock { $0 } == 0)
            await volume.expectKernelToStay()
            #expect(lost.withLock { $0 } == 1, "the one that ended meanwhile is to be replaced")
            ends[1].shutDown()
            await waitUntil { lost.withLock { $0 } == 2 }
            let third = try KernelEnd(volume)
            await waitUntil { await volume.status()?.kernelConnections == 1 }
            await volume.severKernel()
            #expect(third.isClosed)
            #expect(lost.withLock { $0 } == 2)
            await volume.expectKernelToStay()
            #expect(lost.withLock { $0 } == 3, "a device without connections is to get some")
        }
    }

    private func withVolume(
        report: @escaping @Sendable (SessionEvent) -> Void = { _ in },
        _ body: (Volume, HeldBackend) async throws -> Void
    ) async throws {
        let backend = HeldBackend()
        try await withMappedVolume(of: backend, report: report) { try await body($0, backend) }
    }
}

/// Completes nothing until it is told to. Writes are known by their first byte.
private final class HeldBackend: TestBackend, @unchecked Sendable {
    private struct State {
        var begun: [UInt8] = []
        /// Addresses.
        var held: [UInt8: UInt] = [:]
        var blockedAt: UInt8?
    }
    private let state = Mutex(State())
    private let unblocked = Semaphore()
    private var loop: EventLoop?
    private weak var client: (any BackendClient)?
    let geometry = Geometry(size: 1 << 20, blockSize: 512)

    var begun: [UInt8] { state.withLock { $0.begun } }

    func start(_ loop: EventLoop, _ client: any BackendClient) {
        self.loop = loop
        self.client = client
    }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        let address = UInt(bitPattern: io)
        let mark = io.pointee.segment.base.load(as: UInt8.self)
        let blocks = state.withLock { state in
            state.begun.append(mark)
            state.held[mark] = address
            return state.blockedAt == mark
        }
        if blocks { unblocked.wait() }
    }

    func complete(_ mark: UInt8) {
        loop?.post { [self] in
            let address = state.withLock { $0.held.removeValue(forKey: mark) }
            if let io = address.flatMap({ UnsafeMutablePointer<IO>(bitPattern: $0) }) { client?.completed(io) }
        }
    }

    /// Holds the loop itself while this write is being begun.
    func blockAt(_ mark: UInt8) { state.withLock { $0.blockedAt = mark } }
    func unblock() { unblocked.signal() }

    func waitUntilBegun(_ marks: [UInt8]) async { await waitUntil { begun == marks } }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }
    func resized(to size: UInt64) {}
    func close() {}
}

/// The kernel's end of a connection, or another client's.
private final class KernelEnd {
    private let socket: Int32

    /// - Parameters:
    ///   - peer: nil for the kernel.
    ///   - export: of the handshake, where it is not the volume's.
    init(_ volume: Volume, peer: String? = nil, export: Export? = nil) throws {
        let pair = try SocketPair.make(count: 1)[0]
        socket = pair.kernel
        guard let peer else {
            volume.attachKernel([pair.server])
            return
        }
        volume.attach(
            descriptor: pair.server, peer: peer,
            negotiated: Negotiated(export: export ?? volume.export, structured: false, baseAllocation: false),
            leftover: [])
    }

    deinit { close(socket) }

    /// A write of 512 bytes of `mark`, which is its cookie, too.
    func write(mark: UInt8, block: UInt8 = 0) {
        var bytes: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]
        bytes += [0, 0, 0, 0, 0, 0, 0, mark]
        bytes += [0, 0, 0, 0, 0, 0, 2 * block, 0]
        bytes += [0, 0, 2, 0]
        bytes += [UInt8](repeating: mark, count: 512)
        #expect(send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) == bytes.count)
    }

    /// What the driver does to a connection it gives up.
    func shutDown(_ how: Int = SHUT_RDWR) { shutdown(socket, Int32(how)) }

    /// The cookies of successful replies.
    func readReplies(_ count: Int) -> [UInt8] {
        var cookies: [UInt8] = []
        for _ in 0..<count {
            let reply = read(16)
            #expect(Array(reply.prefix(8)) == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0])
            cookies.append(reply.last ?? 0)
        }
        return cookies
    }

    /// Whether the other side has closed without a word.
    var isClosed: Bool { read(1).isEmpty }

    private func read(_ count: Int) -> [UInt8] { receive(count, from: socket) }
}
