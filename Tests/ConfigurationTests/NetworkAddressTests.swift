import Configuration
import Testing

@Suite("Network addresses")
struct NetworkAddressTests {
    @Test(
        "An address is a host and a port, with brackets around IPv6",
        arguments: [
            ("127.0.0.1:10809", "127.0.0.1", 10809),
            ("store-1.example.org:1", "store-1.example.org", 1),
            ("[::1]:65535", "::1", 65535),
            ("[fe80::1%eth0]:2181", "fe80::1%eth0", 2181),
        ] as [(String, String, UInt16)])
    func parsed(text: String, host: String, port: UInt16) throws {
        let address = try NetworkAddress(parsing: text)
        #expect(address.host == host)
        #expect(address.port == port)
        #expect(address.description == text)
    }

    @Test("The default port stands in for a missing one")
    func defaultPort() throws {
        #expect(try NetworkAddress(parsing: "host", defaultPort: 49180).description == "host:49180")
        #expect(try NetworkAddress(parsing: "[::1]", defaultPort: 49180).description == "[::1]:49180")
        #expect(try NetworkAddress(parsing: "host:7", defaultPort: 49180).port == 7)
    }

    @Test("Port 0 is a port only for a listening socket")
    func portZero() throws {
        #expect(try NetworkAddress(parsing: "[::]:0", allowingPortZero: true).port == 0)
        #expect(
            failure { try NetworkAddress(parsing: "[::]:0") }
                == "'[::]:0' has '0' where its port should be; a port is a number from 1 to 65535")
    }

    @Test(
        "What is no address is refused with a text that says why",
        arguments: [
            ("", "an address is empty; write host:port or [IPv6 address]:port"),
            ("host", "'host' has no port; write host:port or [IPv6 address]:port"),
            ("[::1]", "'[::1]' has no port; write host:port or [IPv6 address]:port"),
            ("host:", "'host:' has '' where its port should be; a port is a number from 1 to 65535"),
            ("host:x", "'host:x' has 'x' where its port should be; a port is a number from 1 to 65535"),
            ("host:+1", "'host:+1' has '+1' where its port should be; a port is a number from 1 to 65535"),
            ("host:-1", "'host:-1' has '-1' where its port should be; a port is a number from 1 to 65535"),
            ("host:65536", "'host:65536' has '65536' where its port should be; a port is a number from 1 to 65535"),
            (":10809", "':10809' has no host; write host:port, such as 0.0.0.0:10809"),
            ("::1:10809", "'::1:10809' has more than one ':'; an IPv6 address is written [address]:port"),
            ("[::1:10809", "'[::1:10809' has no ']' after its IPv6 address"),
            ("[]:1", "'[]:1' has no IPv6 address in its brackets"),
            ("[host]:1", "'[host]:1' has no IPv6 address in its brackets"),
            ("[::1]10809", "'[::1]10809' has '10809' where ':' and a port should be"),
            ("ho st:1", "the host in 'ho st:1' holds ' ' (U+0020)"),
            ("http://host:1", "'http://host:1' has more than one ':'; an IPv6 address is written [address]:port"),
            ("a/b:1", "the host in 'a/b:1' holds '/'"),
        ])
    func refused(text: String, message: String) {
        #expect(failure { try NetworkAddress(parsing: text) } == message)
    }
}
