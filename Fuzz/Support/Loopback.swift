import Glibc

/// TCP on 127.0.0.1, blocking, and system calls that libFuzzer's clock interrupts.
package enum Loopback {
    /// - Parameter port: 0 for any.
    package static func listen(port: UInt16 = 0) -> (descriptor: Int32, port: UInt16) {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        var address = self.address(port)
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let result = withUnsafeMutablePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                bind(descriptor, address, length) == 0 && Glibc.listen(descriptor, 64) == 0
                    && getsockname(descriptor, address, &length) == 0
            }
        }
        require(result, "cannot listen: errno \(errno)")
        return (descriptor, UInt16(bigEndian: address.sin_port))
    }

    package static func connect(port: UInt16) -> Int32 {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        var address = self.address(port)
        let result = withUnsafeMutablePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                retrying { Glibc.connect(descriptor, address, socklen_t(MemoryLayout<sockaddr_in>.size)) }
            }
        }
        require(result == 0, "cannot connect: errno \(errno)")
        setNoDelay(descriptor)
        return descriptor
    }

    package static func setNoDelay(_ descriptor: Int32) {
        var one: Int32 = 1
        setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_NODELAY, &one, 4)
    }

    private static func address(_ port: UInt16) -> sockaddr_in {
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        return address
    }

    /// Closes with a reset: thousands of connections in a second would leave no port for another one.
    package static func reset(_ descriptor: Int32) {
        var now = linger(l_onoff: 1, l_linger: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &now, socklen_t(MemoryLayout<linger>.size))
        close(descriptor)
    }

    /// Whether something is there to receive, or the end, within so many milliseconds.
    package static func isReadable(_ descriptor: Int32, within milliseconds: Int32) -> Bool {
        var state = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        return retrying { poll(&state, 1, milliseconds) } > 0
    }

    /// Appends what is there; false at the end of the stream.
    package static func receive(_ descriptor: Int32, into bytes: inout [UInt8], waiting: Bool = true) -> Bool {
        withUnsafeTemporaryAllocation(byteCount: 65536, alignment: 8) { buffer in
            let count = retrying {
                Int32(recv(descriptor, buffer.baseAddress, buffer.count, waiting ? 0 : Int32(MSG_DONTWAIT)))
            }
            if count > 0 { bytes.append(contentsOf: buffer.prefix(Int(count))) }
            return count > 0 || count < 0 && errno == EAGAIN
        }
    }

    /// - Returns: whether the peer took all of it.
    package static func send(_ descriptor: Int32, _ bytes: [UInt8]) -> Bool {
        bytes.withUnsafeBytes { buffer in
            var sent = 0
            while sent < buffer.count {
                let count = Glibc.send(
                    descriptor, buffer.baseAddress.map { $0 + sent }, buffer.count - sent, Int32(MSG_NOSIGNAL))
                if count < 0, errno == EINTR { continue }
                guard count > 0 else { return false }
                sent += count
            }
            return true
        }
    }

    package static func retrying(_ call: () -> Int32) -> Int32 {
        while true {
            let result = call()
            if result >= 0 || errno != EINTR { return result }
        }
    }
}
