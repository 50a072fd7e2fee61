import EventLoop
import Glibc
import Testing

/// Runs file operations on a loop and hands their results out.
private final class Harness: FileCompletion, @unchecked Sendable {
    let loop: EventLoop
    var ring: FileRing?
    var waiting: [Int: CheckedContinuation<Int32, Never>] = [:]
    var next = 1

    init(useRing: Bool, capacity: Int = 256) async throws {
        loop = try EventLoop(name: "test")
        let made = await loop.call { [self] in
            ring = try? FileRing(loop: loop, capacity: capacity, useRing: useRing, completion: self)
            return ring?.usesRing
        }
        try #require(made == .some(useRing))
    }

    func fileOperationCompleted(_ context: UnsafeMutableRawPointer, result: Int32) {
        waiting.removeValue(forKey: Int(bitPattern: context))?.resume(returning: result)
    }

    func run(_ start: @escaping @Sendable (FileRing, UnsafeMutableRawPointer) -> Bool) async -> Int32 {
        await withCheckedContinuation { continuation in
            loop.post { [self] in
                guard let ring, let context = UnsafeMutableRawPointer(bitPattern: next) else { return }
                waiting[next] = continuation
                next += 1
                #expect(start(ring, context))
            }
        }
    }

    func close() async {
        _ = await loop.call { [self] in
            ring?.close()
            ring = nil
        }
        loop.stop()
    }
}

/// Reads and writes in turn, each begun where the one before completes.
private final class Chain: FileCompletion, @unchecked Sendable {
    let ring: @Sendable () -> FileRing?
    let file: Int32
    let memory = Memory(4096, byte: 3)
    var left: Int
    let done: @Sendable () -> Void

    init(_ count: Int, _ file: Int32, ring: @escaping @Sendable () -> FileRing?, done: @escaping @Sendable () -> Void) {
        left = count
        self.file = file
        self.ring = ring
        self.done = done
    }

    func fileOperationCompleted(_ context: UnsafeMutableRawPointer, result: Int32) {
        #expect(result == 0)
        left -= 1
        if left == 0 { return done() }
        start()
    }

    func start() {
        let started =
            left % 2 == 0
            ? ring()?.read(file, into: memory.base, length: 4096, offset: 0, context: memory.base)
            : ring()?.write(file, from: memory.base, length: 4096, offset: 0, context: memory.base)
        #expect(started == true)
    }
}

private struct Memory: @unchecked Sendable {
    let base: UnsafeMutableRawPointer
    init(_ count: Int, byte: UInt8) {
        base = .allocate(byteCount: count, alignment: 4096)
        memset(base, Int32(byte), count)
    }
}

@Suite struct FileRingTests {
    private func temporaryFile(size: Int) throws -> Int32 {
        var path = Array("/tmp/qbd-ring-XXXXXX".utf8CString)
        let descriptor = mkstemp(&path)
        try #require(descriptor >= 0)
        unlink(path)
        try #require(ftruncate(descriptor, off_t(size)) == 0)
        return descriptor
    }

    @Test(arguments: [true, false]) func whatIsWrittenIsRead(useRing: Bool) async throws {
        let harness = try await Harness(useRing: useRing)
        let file = try temporaryFile(size: 1 << 20)
        let output = Memory(65536, byte: 0xa5)
        let input = Memory(65536, byte: 0)
        #expect(
            await harness.run {
                $0.write(file, from: output.base, length: 65536, offset: 8192, context: $1)
            } == 0)
        #expect(await harness.run { $0.synchronize(file, range: 8192..<73728, context: $1) } == 0)
        #expect(await harness.run { $0.synchronize(file, context: $1) } == 0)
        #expect(await harness.run { $0.read(file, into: input.base, length: 65536, offset: 8192, context: $1) } == 0)
        #expect(memcmp(input.base, output.base, 65536) == 0)
        await harness.close()
        Glibc.close(file)
    }

    @Test(arguments: [true, false]) func behindTheEndIsAnError(useRing: Bool) async throws {
        let harness = try await Harness(useRing: useRing)
        let file = try temporaryFile(size: 4096)
        let input = Memory(8192, byte: 0)
        #expect(
            await harness.run { $0.read(file, into: input.base, length: 8192, offset: 0, context: $1) } == -EIO)
        await harness.close()
        Glibc.close(file)
    }

    @Test(arguments: [true, false]) func extentsAlternateBetweenDataAndHoles(useRing: Bool) async throws {
        let harness = try await Harness(useRing: useRing)
        let file = try temporaryFile(size: 1 << 20)
        let output = Memory(65536, byte: 1)
        #expect(
            await harness.run {
                $0.write(file, from: output.base, length: 65536, offset: 131072, context: $1)
            } == 0)
        let table = Memory(4096, byte: 0)
        let count = await harness.run {
            $0.queryExtents(
                file, offset: 0, length: 1 << 20, extents: table.base.bindMemory(to: Extent.self, capacity: 512),
                capacity: 512, context: $1)
        }
        let extents = table.base.assumingMemoryBound(to: Extent.self)
        #expect(count == 3)
        #expect((0..<3).map { extents[$0].length } == [131072, 65536, (1 << 20) - 196608])
        #expect((0..<3).map { extents[$0].flags } == [3, 0, 3])
        await harness.close()
        Glibc.close(file)
    }

    @Test(arguments: [true, false]) func aPunchedHoleReadsAsZeros(useRing: Bool) async throws {
        let harness = try await Harness(useRing: useRing)
        let file = try temporaryFile(size: 65536)
        let output = Memory(65536, byte: 0xff)
        let input = Memory(65536, byte: 1)
        _ = await harness.run {
            $0.write(file, from: output.base, length: 65536, offset: 0, context: $1)
        }
        let mode = Int32(3)  // FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        #expect(await harness.run { $0.allocate(file, mode: mode, offset: 4096, length: 8192, context: $1) } == 0)
        #expect(await harness.run { $0.read(file, into: input.base, length: 65536, offset: 0, context: $1) } == 0)
        let bytes = UnsafeRawBufferPointer(start: input.base, count: 65536)
        #expect(bytes[4095] == 0xff && bytes[4096] == 0 && bytes[12287] == 0 && bytes[12288] == 0xff)
        await harness.close()
        Glibc.close(file)
    }

    /// More than the kernel has room for completions of.
    @Test(.timeLimit(.minutes(1)), arguments: [true, false]) func manyAtATimeAllComplete(useRing: Bool) async throws {
        let count = 2000
        let harness = try await Harness(useRing: useRing, capacity: count)
        let file = try temporaryFile(size: 4096 * count)
        let results = await withTaskGroup(of: Int32.self) { group in
            for index in 0..<count {
                group.addTask {
                    let offset = UInt64(4096 * index)
                    return await harness.run {
                        $0.allocate(file, mode: 0, offset: offset, length: 4096, context: $1)
                    }
                }
            }
            return await group.reduce(into: []) { $0.append($1) }
        }
        #expect(results.count == count && results.allSatisfy { $0 == 0 })
        await harness.close()
        Glibc.close(file)
    }

    /// Nothing stays behind when nothing else wakes the loop.
    @Test(.timeLimit(.minutes(1)), arguments: [true, false])
    func oneStartsTheNext(useRing: Bool) async throws {
        let file = try temporaryFile(size: 65536)
        let loop = try EventLoop(name: "test")
        let held = Held()
        await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
            let chain = Chain(50, file, ring: { held.ring }, done: { done.resume() })
            loop.post {
                held.chain = chain
                held.ring = try? FileRing(loop: loop, capacity: 8, useRing: useRing, completion: chain)
                chain.start()
            }
        }
        _ = await loop.call {
            held.ring?.close()
            held.ring = nil
        }
        loop.stop()
        Glibc.close(file)
    }

    private final class Held: @unchecked Sendable {
        var ring: FileRing?
        var chain: Chain?
    }
}
