/// The name of a volume or of one of its snapshots: `[tcp://|rdma://]pool/volume[@snapshot]`.
///
/// Every component was checked by ``validate(component:as:)``, so it can be part of a path or of a URI as it is.
/// Two names are equal when they name the same volume or snapshot: `transport` says how to get there and takes no
/// part, so `tcp://a/b` and `rdma://a/b` are one key of a dictionary.
package struct VolumeName: Sendable, CustomStringConvertible {
    package let pool: String
    package let volume: String
    package let snapshot: String?
    /// What the scheme asked for; nil without a scheme, and `client.conn_type` decides.
    package let transport: Transport?

    package init(
        pool: String, volume: String, snapshot: String? = nil, transport: Transport? = nil
    ) throws(ConfigurationError) {
        try Self.validate(component: pool, as: "pool name")
        try Self.validate(component: volume, as: "volume name")
        if let snapshot {
            try Self.validate(component: snapshot, as: "snapshot name")
        }
        self.pool = pool
        self.volume = volume
        self.snapshot = snapshot
        self.transport = transport
    }

    package init(parsing text: String) throws(ConfigurationError) {
        guard !text.isEmpty else {
            throw ConfigurationError("the name is empty; write pool/volume")
        }
        let (transport, path) = try Self.splitScheme(text)
        guard let slash = path.unicodeScalars.firstIndex(of: "/") else {
            throw ConfigurationError("\(excerpt(text)) names no pool; write pool/volume")
        }
        let rest = path.unicodeScalars[path.unicodeScalars.index(after: slash)...]
        let at = rest.firstIndex(of: "@")
        try self.init(
            pool: String(path.unicodeScalars[..<slash]),
            volume: String(rest[..<(at ?? rest.endIndex)]),
            snapshot: at.map { String(rest[rest.index(after: $0)...]) },
            transport: transport)
    }

    /// `volume[@snapshot]`: what a pool knows it by.
    package var inPool: String { volume + (snapshot.map { "@\($0)" } ?? "") }

    /// `pool/volume[@snapshot]`, without a scheme.
    package var description: String {
        "\(pool)/\(volume)" + (snapshot.map { "@\($0)" } ?? "")
    }

    /// Refuses what is not 1 to 128 of `A-Z a-z 0-9 . _ -`, and `.` and `..`.
    ///
    /// - Parameter part: what the component is called in the error's text, such as "pool name".
    package static func validate(component: String, as part: String = "name") throws(ConfigurationError) {
        guard !component.isEmpty else {
            throw ConfigurationError("the \(part) is empty; it has 1 to \(maximumComponentLength) characters")
        }
        guard component != "." && component != ".." else {
            throw ConfigurationError("the \(part) cannot be \(excerpt(component))")
        }
        if let stranger = component.unicodeScalars.first(where: { !isAllowed($0) }) {
            throw ConfigurationError(
                "the \(part) \(excerpt(component)) holds \(excerpt(stranger));"
                    + " allowed are A-Z, a-z, 0-9, '.', '_' and '-'")
        }
        guard component.utf8.count <= maximumComponentLength else {
            throw ConfigurationError(
                "the \(part) \(excerpt(component)) is \(component.utf8.count) characters long;"
                    + " at most \(maximumComponentLength) are allowed")
        }
    }

    /// Bytes. Leaves room for a suffix in a file name (NAME_MAX is 255).
    package static let maximumComponentLength = 128

    private static func isAllowed(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar {
        case "A"..."Z", "a"..."z", "0"..."9", ".", "_", "-": true
        default: false
        }
    }

    private static func splitScheme(_ text: String) throws(ConfigurationError) -> (Transport?, Substring) {
        // A scheme ends at the first "://"; the slash of pool/volume cannot come before it.
        let scalars = text.unicodeScalars
        guard let colon = scalars.firstIndex(where: { $0 == ":" || $0 == "/" }),
            scalars[colon...].starts(with: "://".unicodeScalars)
        else {
            return (nil, text[...])
        }
        let scheme = String(scalars[..<colon])
        guard let transport = Transport(rawValue: scheme) else {
            throw ConfigurationError(
                "\(excerpt(text)) has the unknown protocol \(excerpt(scheme)); write tcp://, rdma://, or none")
        }
        return (transport, Substring(scalars[scalars.index(colon, offsetBy: 3)...]))
    }
}

extension VolumeName: Hashable {
    package static func == (left: Self, right: Self) -> Bool {
        left.pool == right.pool && left.volume == right.volume && left.snapshot == right.snapshot
    }

    package func hash(into hasher: inout Hasher) {
        hasher.combine(pool)
        hasher.combine(volume)
        hasher.combine(snapshot)
    }
}
