import Glibc
import PureFlash
import Testing

struct StoreAddressTests {
    @Test(
        "a connection that does not leave the host is told from others",
        arguments: [
            ("127.0.0.1", "127.0.0.1", true), ("127.0.0.1", "127.0.0.2", true), ("::1", "::1", true),
            ("0.0.0.0", "192.0.2.1", false), ("127.0.0.1", "::1", false), ("::", "2001:db8::1", false),
        ])
    func within(own: String, store: String, isWithin: Bool) throws {
        let address = try #require(StoreAddress(store))
        try withSocket(at: own) { #expect(address.isReachedWithin($0) == isWithin) }
    }

    /// A socket whose own end has this address.
    private func withSocket(at own: String, _ body: (Int32) throws -> Void) throws {
        let address = try #require(StoreAddress(own, port: 0))
        let descriptor = socket(address.family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        // A host may have no IPv6.
        guard descriptor >= 0 else { return #expect(errno == EAFNOSUPPORT) }
        defer { close(descriptor) }
        let bound = withUnsafePointer(to: address.storage) { storage in
            storage.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(descriptor, $0, address.length) }
        }
        if bound == 0 { try body(descriptor) } else { #expect(errno == EADDRNOTAVAIL) }
    }
}
