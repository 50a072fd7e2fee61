import FuzzSupport
import Glibc

/// The client's end of a session: sends the script and receives all there is until the server closes.
struct Client {
    private let descriptor: Int32
    /// The server must move within this time, whatever it was sent.
    private static let patience: Int32 = 5000

    init(path: String) {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                retrying { connect(descriptor, address, socklen_t(MemoryLayout<sockaddr_un>.size)) }
            }
        }
        require(result == 0, "the server does not accept: errno \(errno)")
    }

    func converse(_ script: Script) -> [UInt8] {
        defer { close(descriptor) }
        var received: [UInt8] = []
        var sent = 0
        var piece = 1
        var over = false
        while !over {
            let sending = sent < script.wire.count
            if !sending, script.ending == .cutOff { break }
            var state = pollfd(fd: descriptor, events: Int16(POLLIN | (sending ? POLLOUT : 0)), revents: 0)
            let ready = retrying { poll(&state, 1, Self.patience) }
            require(ready > 0, "the server does nothing, \(script.wire.count - sent) bytes unsent")
            if state.revents & Int16(POLLIN | POLLHUP | POLLERR) != 0, script.ending != .cutOff || !sending {
                over = receive(&received, mayBeReset: script.hasRawBytes)
            } else if script.ending == .cutOff, state.revents & Int16(POLLOUT) == 0 {
                break
            }
            guard sending, state.revents & Int16(POLLOUT) != 0 else { continue }
            // Pieces of all sizes: 1, 6, 31, 156, ...
            let limit = script.inPieces ? piece : Int.max
            piece = piece > 20000 ? 1 : piece * 5 + 1
            sent = send(script.wire, from: sent, limit)
            if sent == script.wire.count, script.ending == .shutdown || script.hasRawBytes {
                shutdown(descriptor, Int32(SHUT_WR))
            }
        }
        return received
    }

    /// - Returns: how much is sent then; all when there is nobody to take it.
    private func send(_ bytes: [UInt8], from start: Int, _ limit: Int) -> Int {
        bytes.withUnsafeBytes { buffer in
            let count = min(limit, buffer.count - start)
            let sent = Glibc.send(
                descriptor, buffer.baseAddress.map { $0 + start }, count, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
            if sent >= 0 { return start + sent }
            return errno == EAGAIN ? start : buffer.count
        }
    }

    /// - Returns: whether that was the end.
    private func receive(_ received: inout [UInt8], mayBeReset: Bool) -> Bool {
        withUnsafeTemporaryAllocation(byteCount: 65536, alignment: 8) { buffer in
            let count = recv(descriptor, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
            if count < 0 {
                require(errno == EAGAIN || mayBeReset && errno == ECONNRESET, "receive: errno \(errno)")
                return errno != EAGAIN
            }
            received.append(contentsOf: buffer.prefix(count))
            return count == 0
        }
    }
}

/// libFuzzer's clock interrupts system calls.
private func retrying(_ call: () -> CInt) -> CInt {
    while true {
        let result = call()
        if result >= 0 || errno != EINTR { return result }
    }
}
