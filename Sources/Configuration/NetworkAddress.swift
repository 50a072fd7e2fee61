/// `host:port` or `[IPv6]:port`, checked for its form; no name is looked up.
package struct NetworkAddress: Hashable, Sendable, CustomStringConvertible {
    /// A host name, an IPv4 address, or an IPv6 address without its brackets.
    package let host: String
    package let port: UInt16

    /// - Parameters:
    ///   - defaultPort: used when `text` has no port; nil makes that an error.
    ///   - allowingPortZero: whether port 0, at which the kernel chooses one for a listening socket, is a port.
    package init(
        parsing text: String, defaultPort: UInt16? = nil, allowingPortZero: Bool = false
    ) throws(ConfigurationError) {
        let (host, portText) = try Self.split(text)
        self.host = host
        guard let portText else {
            guard let defaultPort else {
                throw ConfigurationError("\(excerpt(text)) has no port; write host:port or [IPv6 address]:port")
            }
            port = defaultPort
            return
        }
        let lowest: UInt16 = allowingPortZero ? 0 : 1
        guard portText.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let port = UInt16(portText), port >= lowest
        else {
            throw ConfigurationError(
                "\(excerpt(text)) has \(excerpt(portText)) where its port should be;"
                    + " a port is a number from \(lowest) to 65535")
        }
        self.port = port
    }

    /// The form it was parsed from: an IPv6 address has its brackets again.
    package var description: String {
        host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]:\(port)" : "\(host):\(port)"
    }

    /// The same host.
    package func with(port: UInt16) -> NetworkAddress { NetworkAddress(host: host, port: port) }

    private init(host: String, port: UInt16) {
        self.host = host
        self.port = port
    }

    private static func split(_ text: String) throws(ConfigurationError) -> (host: String, port: String?) {
        guard !text.isEmpty else {
            throw ConfigurationError("an address is empty; write host:port or [IPv6 address]:port")
        }
        let host: Substring
        let rest: Substring
        if text.hasPrefix("[") {
            guard let bracket = text.firstIndex(of: "]") else {
                throw ConfigurationError("\(excerpt(text)) has no ']' after its IPv6 address")
            }
            host = text[text.index(after: text.startIndex)..<bracket]
            rest = text[text.index(after: bracket)...]
            guard host.contains(":"), host.unicodeScalars.allSatisfy(isInIPv6Address) else {
                throw ConfigurationError("\(excerpt(text)) has no IPv6 address in its brackets")
            }
        } else {
            let colon = text.firstIndex(of: ":") ?? text.endIndex
            host = text[..<colon]
            rest = text[colon...]
            guard rest.dropFirst().firstIndex(of: ":") == nil else {
                throw ConfigurationError(
                    "\(excerpt(text)) has more than one ':'; an IPv6 address is written [address]:port")
            }
            guard !host.isEmpty else {
                throw ConfigurationError("\(excerpt(text)) has no host; write host:port, such as 0.0.0.0:10809")
            }
            if let stranger = host.unicodeScalars.first(where: { !isInHostName($0) }) {
                throw ConfigurationError("the host in \(excerpt(text)) holds \(excerpt(stranger))")
            }
        }
        guard rest.isEmpty || rest.first == ":" else {
            throw ConfigurationError("\(excerpt(text)) has \(excerpt(rest)) where ':' and a port should be")
        }
        return (String(host), rest.isEmpty ? nil : String(rest.dropFirst()))
    }

    private static func isInHostName(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar {
        case "A"..."Z", "a"..."z", "0"..."9", ".", "_", "-": true
        default: false
        }
    }

    /// Also the zone of a link-local address, such as `%eth0`.
    private static func isInIPv6Address(_ scalar: Unicode.Scalar) -> Bool {
        scalar == ":" || scalar == "%" || isInHostName(scalar)
    }
}
