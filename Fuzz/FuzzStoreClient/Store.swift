import FuzzSupport
import Glibc
import PureFlash

/// The store's end, on libFuzzer's thread: one connection at a time, as the client has it.
struct Store {
    /// Nothing the client owes may take longer, milliseconds.
    private static let patience: Int32 = 10_000

    private let listener: Int32
    private var connection: Int32 = -1
    private var granted = 0
    private var received: [UInt8] = []
    /// Commands that are not answered.
    private var outstanding: [StoreCommand] = []
    private var output: [UInt8] = []
    private(set) var hasFailedRequests = false

    init(listener: Int32) { self.listener = listener }

    mutating func close() {
        if connection >= 0 { Loopback.reset(connection) }
        connection = -1
        outstanding = []
        received = []
        output = []
    }

    // MARK: As the input says

    mutating func misbehave(_ input: inout InputReader, requests: Int) {
        guard shakeHands(&input) else { return leave() }
        // All of them, as many at a time as it may have.
        while outstanding.count < min(requests, granted) { receive(waiting: true) }
        var isInStep = true
        while !input.isEmpty, isInStep {
            isInStep = act(&input)
            if outstanding.isEmpty { receive(waiting: false) }
        }
        flush()
        if !isInStep { leave() }
    }

    /// Says no more; the client must close, if it has not done so.
    private mutating func leave() {
        guard connection >= 0 else { return }
        shutdown(connection, Int32(SHUT_WR))
        repeat {
            require(
                Loopback.isReadable(connection, within: Self.patience), "the client keeps a connection that is over")
        } while Loopback.receive(connection, into: &received)
        close()
    }

    /// - Returns: whether the client goes on with this connection.
    private mutating func shakeHands(_ input: inout InputReader) -> Bool {
        let hello = accept()
        let mode = input.byte()
        var answer = StoreHandshake(depth: hello.depth, volumeID: hello.volumeID, result: 0)
        var bytes: [UInt8]
        switch mode & 7 {
        case 0: bytes = input.take(Int(input.byte()))
        case 1:
            answer.depth = Int16(bitPattern: input.half())
            bytes = encoded(answer)
        case 2:
            answer.result = Int16(bitPattern: input.half())
            bytes = encoded(answer)
        case 3:
            bytes = encoded(answer)
            bytes[Int(input.byte()) % bytes.count] = input.byte()
        case 4: bytes = Array(encoded(answer).prefix(Int(input.byte() % 32)))
        default: bytes = encoded(answer)
        }
        // In two pieces.
        let cut = Int(mode >> 3) % (bytes.count + 1)
        _ = Loopback.send(connection, Array(bytes[..<cut])) && Loopback.send(connection, Array(bytes[cut...]))
        guard bytes.count == StoreHandshake.size else { return false }
        let said = bytes.withUnsafeBytes { StoreHandshake(decoding: $0.baseAddress.unsafelyUnwrapped) }
        granted = min(Int(said.depth), Volume.depth)
        return said.result == 0 && said.volumeID == Volume.id
            && (1...StoreProtocol.maximumDepth).contains(Int(said.depth))
    }

    /// - Returns: whether the client can still follow.
    private mutating func act(_ input: inout InputReader) -> Bool {
        let action = input.byte()
        guard !outstanding.isEmpty else { return false }
        let index = Int(action >> 4) % outstanding.count
        let command = outstanding[index]
        switch action & 15 {
        case 0, 1, 2: answer(index)
        case 3, 4:
            let status = StoreStatus(
                rawValue: [0x4000, 0xC0, 0x40C0, 0x4009, 0x2000, input.half()][Int(input.byte() % 6)])
            answer(index, status)
        case 5: answer(index, StoreStatus(rawValue: input.half()))
        case 6:
            // Once more than asked for.
            answer(index)
            output += reply(command)
            return false
        case 7:
            var other = command
            other.id ^= UInt16(input.byte()) + 1
            output += reply(other)
            return false
        case 8:
            var other = command
            other.sequence &+= UInt32(input.byte()) + 1
            output += reply(other)
            return false
        case 9:
            // What is left over in the bytes without a meaning.
            var bytes = reply(command)
            for place in [6, 7] + (16..<32) { bytes[place] = input.byte() }
            outstanding.remove(at: index)
            output += bytes + data(command, .success)
        case 10:
            let whole = reply(command) + data(command, .success)
            output += whole.prefix(Int(input.half()) % whole.count)
            return false
        case 11:
            output += input.take(Int(input.byte()) + 1)
            return false
        case 12:
            output += [UInt8](repeating: input.byte(), count: Int(input.half()) + 1)
            return false
        case 13:
            var bytes = reply(command)
            // The fields without an effect.
            bytes[[2, 3, 12, 13, 14, 15][Int(input.byte() % 6)]] = input.byte()
            outstanding.remove(at: index)
            output += bytes + data(command, .success)
        case 14: flush()
        default: return false
        }
        return true
    }

    // MARK: As it should

    /// Answers what is there, or waits for what comes.
    mutating func behave() {
        if connection < 0 {
            _ = accept()
            granted = Volume.depth
            _ = Loopback.send(
                connection, encoded(StoreHandshake(depth: Int16(granted), volumeID: Volume.id, result: 0)))
        }
        while !outstanding.isEmpty { answer(0) }
        flush()
        // The last of them may be on its way to the client's end; then nothing more comes.
        guard connection >= 0, Loopback.isReadable(connection, within: 1) else {
            return waited += 1
        }
        waited = 0
        receive(waiting: true)
    }

    private var waited = 0 { didSet { require(waited < Self.patience, "a request is never completed") } }

    // MARK: The wire

    private mutating func accept() -> StoreHandshake {
        require(Loopback.isReadable(listener, within: Self.patience), "the client does not connect again")
        connection = Loopback.retrying { Glibc.accept(listener, nil, nil) }
        require(connection >= 0, "accept: errno \(errno)")
        Loopback.setNoDelay(connection)
        var bytes: [UInt8] = []
        while bytes.count < StoreHandshake.size {
            require(Loopback.isReadable(connection, within: Self.patience), "the client sends no handshake")
            guard Loopback.receive(connection, into: &bytes) else { break }
        }
        require(bytes.count == StoreHandshake.size, "a handshake of \(bytes.count) bytes")
        let hello = bytes.withUnsafeBytes { StoreHandshake(decoding: $0.baseAddress.unsafelyUnwrapped) }
        require(hello == StoreHandshake(depth: Int16(Volume.depth), volumeID: Volume.id))
        return hello
    }

    private mutating func receive(waiting: Bool) {
        guard connection >= 0 else { return }
        if waiting { require(Loopback.isReadable(connection, within: Self.patience), "the client does nothing") }
        guard Loopback.receive(connection, into: &received, waiting: waiting) else { return close() }
        while received.count >= StoreCommand.size {
            let command = received.withUnsafeBytes { StoreCommand(decoding: $0.baseAddress.unsafelyUnwrapped) }
            let isWrite = command.opcode == StoreCommand.Opcode.write.rawValue
            let whole = StoreCommand.size + (isWrite ? Int(command.length) : 0)
            check(command)
            guard received.count >= whole else { return }
            if isWrite {
                let expected = Volume.bytes(Int(command.offset), Int(command.length))
                let isSame = received.withUnsafeBytes { received in
                    expected.withUnsafeBytes { expected in
                        memcmp(
                            received.baseAddress.unsafelyUnwrapped + StoreCommand.size,
                            expected.baseAddress.unsafelyUnwrapped,
                            expected.count) == 0
                    }
                }
                require(isSame, "a write carries other bytes")
            }
            received.removeFirst(whole)
            require(!outstanding.contains { $0.id == command.id }, "an id is used twice")
            outstanding.append(command)
            require(outstanding.count <= granted, "more in flight than was granted")
        }
    }

    /// What a store does not survive.
    private func check(_ command: StoreCommand) {
        require(StoreCommand.Opcode(rawValue: command.opcode) != nil && command.volumeID == Volume.id)
        require(command.snapshot == StoreProtocol.head && command.metaVersion == 0)
        require(command.length > 0 && command.length <= StoreProtocol.maximumTransfer)
        require((command.offset | UInt64(command.length)) % UInt64(StoreProtocol.sector) == 0)
        let end = command.offset + UInt64(command.length)
        require(end <= UInt64(Volume.size))
        require(command.offset / StoreProtocol.objectSize == (end - 1) / StoreProtocol.objectSize)
    }

    private mutating func answer(_ index: Int, _ status: StoreStatus = .success) {
        let command = outstanding.remove(at: index)
        if status.code != .success, !status.mayPass { hasFailedRequests = true }
        output += reply(command, status) + data(command, status)
    }

    private func reply(_ command: StoreCommand, _ status: StoreStatus = .success) -> [UInt8] {
        let reply = StoreReply(status: status, id: command.id, sequence: command.sequence)
        var bytes = [UInt8](repeating: 0, count: StoreReply.size)
        bytes.withUnsafeMutableBytes { reply.encode(to: $0.baseAddress.unsafelyUnwrapped) }
        return bytes
    }

    private func data(_ command: StoreCommand, _ status: StoreStatus) -> ArraySlice<UInt8> {
        guard command.opcode == StoreCommand.Opcode.read.rawValue, status == .success else { return [] }
        return Volume.bytes(Int(command.offset), Int(command.length))
    }

    private func encoded(_ message: StoreHandshake) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: StoreHandshake.size)
        bytes.withUnsafeMutableBytes { message.encode(to: $0.baseAddress.unsafelyUnwrapped) }
        return bytes
    }

    private mutating func flush() {
        guard connection >= 0, !output.isEmpty else { return output = [] }
        let isTaken = Loopback.send(connection, output)
        output = []
        if !isTaken { close() }
    }
}
