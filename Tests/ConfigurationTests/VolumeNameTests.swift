import Configuration
import Testing

@Suite("Volume names")
struct VolumeNameTests {
    @Test("Pool and volume are the two sides of the slash")
    func poolAndVolume() throws {
        let name = try VolumeName(parsing: "csi/foo1")
        #expect(name.pool == "csi")
        #expect(name.volume == "foo1")
        #expect(name.snapshot == nil)
        #expect(name.transport == nil)
    }

    @Test("A snapshot follows the @")
    func snapshot() throws {
        let name = try VolumeName(parsing: "csi/foo1@monday")
        #expect(name.volume == "foo1")
        #expect(name.snapshot == "monday")
    }

    @Test("A scheme names the transport", arguments: [("tcp://a/b@c", Transport.tcp), ("rdma://a/b@c", .rdma)])
    func scheme(text: String, transport: Transport) throws {
        let name = try VolumeName(parsing: text)
        #expect(name.transport == transport)
        #expect(name.pool == "a")
    }

    @Test("The description has no scheme", arguments: ["tcp://p/v", "rdma://p/v", "p/v"])
    func description(text: String) throws {
        #expect(try VolumeName(parsing: text).description == "p/v")
        #expect(try VolumeName(parsing: text + "@s").description == "p/v@s")
    }

    @Test("A description reads back as the same name", arguments: ["A-z_0.9/..a", "-/_", "tcp/rdma@tcp", "a/b@..."])
    func roundTrip(text: String) throws {
        let name = try VolumeName(parsing: text)
        #expect(name.description == text)
        #expect(try VolumeName(parsing: name.description) == name)
    }

    @Test("The transport takes no part in equality, the snapshot does")
    func equality() throws {
        let names = try Set(["a/b", "tcp://a/b", "rdma://a/b", "a/b@s"].map { try VolumeName(parsing: $0) })
        #expect(names.count == 2)
    }

    @Test("128 characters are allowed in each component, 129 are not")
    func length() throws {
        let longest = String(repeating: "x", count: 128)
        let name = try VolumeName(parsing: "\(longest)/\(longest)@\(longest)")
        #expect(name.pool == longest)
        for text in ["\(longest)x/v", "p/\(longest)x", "p/v@\(longest)x"] {
            #expect(
                failure { try VolumeName(parsing: text) }
                    .hasSuffix("x...' is 129 characters long; at most 128 are allowed"))
        }
    }

    @Test(
        "What is no name is refused with a text that says which part and which character",
        arguments: [
            ("", "the name is empty; write pool/volume"),
            ("foo1", "'foo1' names no pool; write pool/volume"),
            ("tcp://foo1", "'tcp://foo1' names no pool; write pool/volume"),
            ("/foo1", "the pool name is empty; it has 1 to 128 characters"),
            ("csi/", "the volume name is empty; it has 1 to 128 characters"),
            ("csi/@s", "the volume name is empty; it has 1 to 128 characters"),
            ("csi/foo1@", "the snapshot name is empty; it has 1 to 128 characters"),
            ("./foo1", "the pool name cannot be '.'"),
            ("csi/..", "the volume name cannot be '..'"),
            ("csi/foo1@..", "the snapshot name cannot be '..'"),
            ("../../etc/passwd", "the pool name cannot be '..'"),
            ("a/b/c", "the volume name 'b/c' holds '/'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/b@c@d", "the snapshot name 'c@d' holds '@'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a@s/b", "the pool name 'a@s' holds '@'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/b c", "the volume name 'b c' holds ' ' (U+0020); allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/b\n", "the volume name 'b\\u{a}' holds U+000A; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/b\0c", "the volume name 'b\\u{0}c' holds U+0000; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("é/b", "the pool name 'é' holds 'é' (U+00E9); allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("a/\u{202E}b", "the volume name '\\u{202e}b' holds U+202E; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
            ("http://a/b", "'http://a/b' has the unknown protocol 'http'; write tcp://, rdma://, or none"),
            ("TCP://a/b", "'TCP://a/b' has the unknown protocol 'TCP'; write tcp://, rdma://, or none"),
            ("://a/b", "'://a/b' has the unknown protocol ''; write tcp://, rdma://, or none"),
            ("tcp:/a/b", "the pool name 'tcp:' holds ':'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"),
        ])
    func refused(text: String, message: String) {
        #expect(failure { try VolumeName(parsing: text) } == message)
    }

    @Test("A combining character cannot hide a slash")
    func combiningCharacter() {
        #expect(
            failure { try VolumeName(parsing: "a/\u{301}b") }
                .hasPrefix("the volume name '\u{301}b' holds "))
    }

    @Test("A name made of parts is checked like a parsed one")
    func memberwise() throws {
        #expect(try VolumeName(pool: "a", volume: "b", snapshot: "c").description == "a/b@c")
        #expect(failure { try VolumeName(pool: "..", volume: "b") } == "the pool name cannot be '..'")
    }

    @Test("A component can be checked alone, under the name the caller gives it")
    func component() throws {
        try VolumeName.validate(component: "vol-1_a.b")
        #expect(failure { try VolumeName.validate(component: "") } == "the name is empty; it has 1 to 128 characters")
        #expect(failure { try VolumeName.validate(component: ".", as: "export") } == "the export cannot be '.'")
    }
}
