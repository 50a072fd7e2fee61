import Configuration
import Testing

/// What `body` throws, as text; records an issue when it throws nothing.
func failure(
    of body: () throws -> some Any, sourceLocation: SourceLocation = #_sourceLocation
) -> String {
    do {
        let value = try body()
        Issue.record("expected an error, got \(value)", sourceLocation: sourceLocation)
        return ""
    } catch {
        return "\(error)"
    }
}

/// A configuration in a file that is called qbd.conf.
func configuration(_ text: String) throws -> DaemonConfiguration {
    try DaemonConfiguration(parsing: text, file: "qbd.conf")
}

/// Why `text` is no configuration.
func fault(in text: String, sourceLocation: SourceLocation = #_sourceLocation) -> String {
    failure(of: { try configuration(text) }, sourceLocation: sourceLocation)
}

/// Why `bytes` are no configuration.
func fault(in bytes: [UInt8], sourceLocation: SourceLocation = #_sourceLocation) -> String {
    failure(of: { try DaemonConfiguration(parsing: bytes, file: "qbd.conf") }, sourceLocation: sourceLocation)
}
