import FuzzSupport
import Glibc
import PureFlash

/// qbd-store's data connections: a handshake and commands, nearly right or not at all, over a socket. What must be
/// answered is worked out apart from the store; nothing a client sends may keep it from serving the next one.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    var input = InputReader(UnsafeBufferPointer(start: start, count: count))
    let server = Server.shared
    var client = Client(port: server.dataPort, volume: server.volume)
    if client.shakeHands(&input) { client.converse(&input) }
    client.close()
    return 0
}

/// A client that knows what it must hear.
struct Client {
    private static let patience: Int32 = 10_000

    private let descriptor: Int32
    private let volume: UInt64
    private var stream: [UInt8] = []
    private var expected: [StoreCommand] = []
    /// Of the command that is the last to be answered.
    private var isOver = false

    init(port: UInt16, volume: UInt64) {
        descriptor = Loopback.connect(port: port)
        self.volume = volume
    }

    func close() { Loopback.reset(descriptor) }

    // MARK: Handshake

    /// - Returns: whether commands may follow.
    mutating func shakeHands(_ input: inout InputReader) -> Bool {
        let mode = input.byte()
        var hello = StoreHandshake(depth: 64, volumeID: volume)
        var bytes = encoded(hello)
        switch mode & 7 {
        case 0: bytes = input.take(32)
        case 1:
            hello.depth = Int16(bitPattern: input.half())
            bytes = encoded(hello)
        case 2: bytes[Int(input.byte() % 32)] = input.byte()
        case 3: bytes = Array(bytes.prefix(Int(input.byte() % 32)))
        default: break
        }
        let cut = Int(mode >> 3) % (bytes.count + 1)
        require(Loopback.send(descriptor, Array(bytes[..<cut])) && Loopback.send(descriptor, Array(bytes[cut...])))
        guard bytes.count == StoreHandshake.size else { return false }
        let said = decoded(bytes)
        let isDepth = (1...StoreProtocol.maximumDepth).contains(Int(said.depth))
        let isGood = isDepth && said.volumeID == volume && said.result == StoreProtocol.version
        let answer = decoded(receive(StoreHandshake.size))
        require(answer.volumeID == said.volumeID)
        require(answer.depth == (isDepth ? said.depth : Int16(StoreProtocol.maximumDepth)))
        require(answer.result == (isGood ? 0 : StoreHandshake.refused))
        if !isGood { awaitEnd() }
        return isGood
    }

    // MARK: Commands

    mutating func converse(_ input: inout InputReader) {
        let mode = input.byte()
        var output: [UInt8] = []
        while !input.isEmpty, !isOver, expected.count < 200 {
            if input.byte() & 31 == 31 {
                // Commands that are none, and nobody knows what they are taken for.
                output += input.take(Int(input.byte()))
                _ = Loopback.send(descriptor, output)
                return
            }
            output += command(&input)
        }
        // In pieces; the last may be missing, or cut off.
        let piece = mode & 3 == 0 ? Int.max : Int(mode) * 97 + 1
        if mode & 0x84 == 0x84 { output.removeLast(min(output.count, Int(mode) * 7)) }
        var rest = output[...]
        while !rest.isEmpty {
            // A store that has answered the last command takes no more.
            guard Loopback.send(descriptor, Array(rest.prefix(piece))) else { break }
            rest = rest.dropFirst(piece)
        }
        guard mode & 0x84 != 0x84 else { return }
        while !expected.isEmpty { takeReply() }
        if isOver { awaitEnd() }
    }

    private mutating func command(_ input: inout InputReader) -> [UInt8] {
        let kind = input.byte()
        let flags = input.byte()
        let isWrite = kind & 1 != 0
        var command = StoreCommand(
            isWrite ? .write : .read, id: UInt16(expected.count) ^ input.half(), volumeID: volume, metaVersion: 0,
            offset: UInt64(input.half()) * 512, length: UInt32(input.byte()) * 512, sequence: UInt32(input.half()))
        if kind & 0x60 == 0x60 { command.opcode = input.byte() }
        if flags & 1 != 0 { command.offset &+= StoreProtocol.objectSize - 64 << 10 }
        if flags & 2 != 0 { command.offset &+= Server.size - 8 << 20 }
        if flags & 4 != 0, kind & 0x80 != 0 { command.metaVersion = input.half() }
        if flags & 8 != 0, kind & 0x80 != 0 { command.volumeID ^= UInt64(input.half()) << 20 }
        if flags & 16 != 0, kind & 0x80 != 0 { command.snapshot ^= UInt32(input.half()) }
        if flags & 32 != 0, kind & 0x80 != 0 { command.length ^= UInt32(input.byte()) }
        if flags & 64 != 0, kind & 0x80 != 0 { command.offset ^= UInt64(input.half()) << UInt64(input.byte() % 56) }
        if flags & 128 != 0, kind & 0x80 != 0 { command.length ^= UInt32(input.half()) << 16 }
        // The same id twice is the client's own fault, and nothing to the store: it is told apart by the sequence.
        if expected.contains(where: { $0.id == command.id && $0.sequence == command.sequence }) { return [] }
        expected.append(command)
        var bytes = [UInt8](repeating: 0xA5, count: StoreCommand.size)
        bytes.withUnsafeMutableBytes { command.encode(to: $0.baseAddress.unsafelyUnwrapped) }
        guard command.opcode == StoreCommand.Opcode.write.rawValue else { return bytes }
        isOver = command.length > StoreProtocol.maximumTransfer
        return bytes + pattern(command, min(Int(command.length), 200 << 10))
    }

    /// Depends on the place alone, so that whatever order writes are done in, a byte is this or zero.
    private func pattern(_ command: StoreCommand, _ length: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: length)
        for place in bytes.indices { bytes[place] = byte(command.offset &+ UInt64(place)) }
        return bytes
    }

    private func byte(_ offset: UInt64) -> UInt8 { UInt8(truncatingIfNeeded: offset / 512 &* 37 &+ 11) | 1 }

    // MARK: Replies

    private mutating func takeReply() {
        let bytes = receive(StoreReply.size)
        let reply = bytes.withUnsafeBytes { StoreReply(decoding: $0.baseAddress.unsafelyUnwrapped) }
        require((bytes[6..<8] + bytes[16...]).allSatisfy { $0 == 0 }, "no reply")
        let index = expected.firstIndex { $0.id == reply.id && $0.sequence == reply.sequence }
        guard let index else { return require(false, "an answer to nothing that was asked") }
        let command = expected.remove(at: index)
        require(reply.status == verdict(command), "\(reply.status) instead of \(verdict(command)) for \(command)")
        require(reply.metaVersion == (reply.status.asksToReopen && command.volumeID != volume ? .max : 0))
        guard command.opcode == StoreCommand.Opcode.read.rawValue, reply.status == .success else { return }
        let data = receive(Int(command.length))
        for sector in stride(from: 0, to: data.count, by: 512) {
            let written = byte(command.offset + UInt64(sector))
            // A write that was cut off, or is under way, may have come as far as the middle of a sector.
            require(data[sector..<sector + 512].allSatisfy { $0 == 0 || $0 == written }, "bytes nobody wrote")
        }
    }

    /// As the specification has it.
    private func verdict(_ command: StoreCommand) -> StoreStatus {
        guard let opcode = StoreCommand.Opcode(rawValue: command.opcode) else { return .invalidOpcode }
        if opcode == .write, command.length > StoreProtocol.maximumTransfer { return .invalidField }
        if command.volumeID != volume { return StoreStatus(rawValue: 0x4009) }
        if command.metaVersion != 0 { return StoreStatus(rawValue: 0x4000) }
        if command.length > StoreProtocol.maximumTransfer { return .invalidField }
        if command.offset % 512 != 0 || command.length % 512 != 0 { return .invalidField }
        let object = StoreProtocol.objectSize
        if command.offset % object + UInt64(command.length) > object { return .invalidField }
        if command.snapshot != StoreProtocol.head {
            return opcode == .write ? .readOnly : StoreStatus(rawValue: 0x4009)
        }
        let (end, isTooLarge) = command.offset.addingReportingOverflow(UInt64(command.length))
        return isTooLarge || end > Server.size ? .lbaRange : .success
    }

    // MARK: The wire

    private mutating func receive(_ count: Int) -> [UInt8] {
        while stream.count < count {
            require(Loopback.isReadable(descriptor, within: Self.patience), "the store does not answer")
            require(
                Loopback.receive(descriptor, into: &stream), "the store closed after \(stream.count) of \(count) bytes")
        }
        defer { stream.removeFirst(count) }
        return Array(stream.prefix(count))
    }

    private mutating func awaitEnd() {
        require(stream.isEmpty, "more than there is to say")
        require(Loopback.isReadable(descriptor, within: Self.patience), "the store does not close")
        require(!Loopback.receive(descriptor, into: &stream), "more than there is to say")
    }

    private func encoded(_ message: StoreHandshake) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: StoreHandshake.size)
        bytes.withUnsafeMutableBytes { message.encode(to: $0.baseAddress.unsafelyUnwrapped) }
        return bytes
    }

    private func decoded(_ bytes: [UInt8]) -> StoreHandshake {
        bytes.withUnsafeBytes { StoreHandshake(decoding: $0.baseAddress.unsafelyUnwrapped) }
    }
}
