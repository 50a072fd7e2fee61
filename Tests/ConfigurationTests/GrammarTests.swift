import Configuration
import Testing

@Suite("qbd.conf: grammar")
struct GrammarTests {
    /// The path of pool a, after `path` and what follows it in the line.
    private func path(_ rest: String) throws -> String {
        guard case .local(let path) = try configuration("[pool.a]\ntype=local\npath\(rest)").pool(named: "a").kind
        else {
            return ""
        }
        return path
    }

    @Test(
        "A value is what is behind the '=', without blanks, comment and quotes",
        arguments: [
            ("=/x", "/x"),
            (" \t= \t/x \t", "/x"),
            ("=/x # comment", "/x"),
            ("=/x#comment", "/x"),
            ("=/x y", "/x y"),
            ("=/x=y", "/x=y"),
            ("=/x\\y", "/x\\y"),
            ("=/[x]", "/[x]"),
            (#"="/x""#, "/x"),
            (#"="/x" # "comment""#, "/x"),
            ("=\"/x\"#comment", "/x"),
            (#"="/x # y""#, "/x # y"),
            (#"="/ x ""#, "/ x "),
            (#"="/x\"y""#, "/x\"y"),
            (#"="/x\\""#, "/x\\"),
            ("=/ü", "/ü"),
        ])
    func value(rest: String, value: String) throws {
        #expect(try path(rest) == value)
    }

    @Test(
        "A section header has blanks and a comment around it at most",
        arguments: ["[client]", "  [client]\t", "[ client ]", "[client]#x", "[client] # [nbd]"])
    func header(text: String) throws {
        #expect(try configuration("\(text)\nio_depth=7").client.ioDepth == 7)
    }

    @Test("Lines may end in LF, CR LF, or with the file")
    func lineEnds() throws {
        let configuration = try configuration("\u{FEFF}[client]\r\nio_depth=7\r\n\r\n[nbd]\nmax_connections=9")
        #expect(configuration.client.ioDepth == 7)
        #expect(configuration.nbd.maxConnections == 9)
        #expect(configuration.warnings == [])
    }

    @Test(
        "A line of another form is an error",
        arguments: [
            ("io_depth", "'io_depth' is neither a [section], nor key = value, nor a # comment"),
            ("io_depth # = 5", "'io_depth # = 5' is neither a [section], nor key = value, nor a # comment"),
            ("; comment", "'; comment' is neither a [section], nor key = value, nor a # comment"),
            ("= 5", "there is no key before '='; write key = value"),
            ("[nbd", "the section header '[nbd' has no ']'; write [section]"),
            ("[nbd # ]", "the section header '[nbd # ]' has no ']'; write [section]"),
            ("[]", "the section header has no name; write [section]"),
            ("[ ]", "the section header has no name; write [section]"),
            ("[nbd] listen=", "'listen=' follows a section header; only a comment can"),
            (#"x = "5"#, "the value of 'x' has no closing quote"),
            (#"x = ""#, "the value of 'x' has no closing quote"),
            (#"x = "5\"#, "the value of 'x' has no closing quote"),
            (#"x = "5\""#, "the value of 'x' has no closing quote"),
            (#"x = "5" 6"#, "'6' follows the quoted value of 'x'; only a comment can"),
            (
                #"x = 5"6""#,
                #"the value of 'x' has a quote inside; put all of it in quotes and write \" for the inner one"#
            ),
            (
                #"x = "C:\temp""#,
                #"the value of 'x' has a backslash before 't'; in quotes write \\ for a backslash and \" for a quote"#
            ),
        ])
    func badLine(text: String, message: String) {
        #expect(fault(in: "[client]\n\(text)") == "qbd.conf:2: \(message)")
        #expect(fault(in: "[client]\r\n  \(text)\t\r\n") == "qbd.conf:2: \(message)")
    }
}
