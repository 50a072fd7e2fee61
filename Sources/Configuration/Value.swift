/// The values of qbd.conf's keys, by type. Each error names the key, the value, and what is right.
package enum Value {
    static func integer(
        _ text: String, of key: String, in range: ClosedRange<Int>, unit: String? = nil
    ) throws(ConfigurationError) -> Int {
        try requireValue(text, of: key)
        guard text.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let value = Int(text), range.contains(value) else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)); it must be a whole number" + (unit.map { " of \($0)" } ?? "")
                    + " from \(range.lowerBound) to \(range.upperBound)")
        }
        return value
    }

    /// Whole seconds, 1 to a day: what is longer is a slip, and 0 would be read as "at once" by one and as "never" by
    /// another.
    package static func seconds(_ text: String, of key: String) throws(ConfigurationError) -> Duration {
        .seconds(try integer(text, of: key, in: 1...86_400, unit: "seconds"))
    }

    /// Milliseconds of a rate that may be saved up for a burst, 1 to a minute: what is longer is no limit any more.
    package static func burst(_ text: String, of key: String) throws(ConfigurationError) -> UInt64 {
        UInt64(try integer(text, of: key, in: 1...60_000, unit: "milliseconds"))
    }

    /// 0 is unlimited.
    package static func rate(bytesPerSecond text: String, of key: String) throws(ConfigurationError) -> UInt64 {
        do throws(ConfigurationError) { return try Quantity.parseRate(bytesPerSecond: text) } catch {
            throw ConfigurationError("'\(key)': \(error.message)")
        }
    }

    /// 0 is unlimited.
    package static func rate(operationsPerSecond text: String, of key: String) throws(ConfigurationError) -> UInt64 {
        do throws(ConfigurationError) { return try Quantity.parseRate(operationsPerSecond: text) } catch {
            throw ConfigurationError("'\(key)': \(error.message)")
        }
    }

    static func flag(_ text: String, of key: String) throws(ConfigurationError) -> Bool {
        try requireValue(text, of: key)
        switch text {
        case "1", "true", "yes", "on": return true
        case "0", "false", "no", "off": return false
        default: throw ConfigurationError("'\(key)' is \(excerpt(text)); it must be 1 or 0")
        }
    }

    /// One of the names of an enumeration.
    static func choice<Choice>(_ text: String, of key: String) throws(ConfigurationError) -> Choice
    where Choice: RawRepresentable<String> & CaseIterable {
        try requireValue(text, of: key)
        guard let choice = Choice(rawValue: text) else {
            let names = Choice.allCases.map(\.rawValue).joined(separator: " or ")
            throw ConfigurationError("'\(key)' is \(excerpt(text)); it must be \(names)")
        }
        return choice
    }

    /// A comma-separated list of `host:port`, each in its canonical form.
    static func addresses(
        _ text: String, of key: String, defaultPort: UInt16?
    ) throws(ConfigurationError) -> [String] {
        try requireValue(text, of: key)
        var addresses: [String] = []
        for part in text.unicodeScalars.split(separator: ",", omittingEmptySubsequences: false) {
            addresses.append(
                try address(String(Grammar.trimmed(part)), of: key, defaultPort: defaultPort).description)
        }
        return addresses
    }

    /// Nil for an empty value: no TCP.
    static func listenAddress(_ text: String, of key: String) throws(ConfigurationError) -> NetworkAddress? {
        text.isEmpty ? nil : try address(text, of: key, allowingPortZero: true)
    }

    /// One component of a ZooKeeper path (ZooKeeper Programmer's Guide, "The ZooKeeper Data Model").
    static func clusterName(_ text: String, of key: String) throws(ConfigurationError) -> String {
        try requireValue(text, of: key)
        guard text != ".", text != "..", !text.utf8.contains(UInt8(ascii: "/")) else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)); the name of a cluster holds no '/' and is neither '.' nor '..'")
        }
        guard text.utf8.count <= VolumeName.maximumComponentLength else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)), \(text.utf8.count) bytes long;"
                    + " at most \(VolumeName.maximumComponentLength) are allowed")
        }
        return text
    }

    /// An absolute path, without slashes at its end and without empty and `.` components, so that equal directories
    /// have equal paths as far as text can tell.
    static func directory(_ text: String, of key: String) throws(ConfigurationError) -> String {
        try requireValue(text, of: key)
        guard text.utf8.first == UInt8(ascii: "/") else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)); it must be an absolute path, one that starts with /")
        }
        let components = text.unicodeScalars.split(separator: "/").filter { !$0.elementsEqual(".".unicodeScalars) }
        guard !components.isEmpty else {
            throw ConfigurationError("'\(key)' is \(excerpt(text)); give the pool a directory of its own")
        }
        return components.map { "/" + String($0) }.joined()
    }

    /// An absolute path of a file, as it is.
    static func path(_ text: String, of key: String) throws(ConfigurationError) -> String {
        try requireValue(text, of: key)
        guard text.utf8.first == UInt8(ascii: "/") else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)); it must be an absolute path, one that starts with /")
        }
        guard text.utf8.count < 4096, !text.utf8.contains(where: { $0 < 0x20 || $0 == 0x7F }) else {
            throw ConfigurationError(
                "'\(key)' is \(excerpt(text)); a path has at most 4095 bytes and no control characters")
        }
        return text
    }

    private static func address(
        _ text: String, of key: String, defaultPort: UInt16? = nil, allowingPortZero: Bool = false
    ) throws(ConfigurationError) -> NetworkAddress {
        do throws(ConfigurationError) {
            return try NetworkAddress(parsing: text, defaultPort: defaultPort, allowingPortZero: allowingPortZero)
        } catch {
            throw ConfigurationError("'\(key)': \(error.message)")
        }
    }

    private static func requireValue(_ text: String, of key: String) throws(ConfigurationError) {
        guard !text.isEmpty else {
            throw ConfigurationError("'\(key)' has no value; write \(key) = VALUE, or remove the line for the default")
        }
    }
}
