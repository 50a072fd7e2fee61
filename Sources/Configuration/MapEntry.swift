/// How a volume is to be mapped: what a line of map.conf says, and what the options of `qbd map` say.
package struct MapEntry: Sendable, Equatable {
    package let name: VolumeName
    /// The configuration to map with, an absolute path; nil for the default.
    package private(set) var config: String?
    /// Serve it over NBD, without a kernel device.
    package private(set) var export = false
    /// Refuse writes.
    package private(set) var readOnly = false
    /// `/dev/nbdX`; nil for any that is free.
    package private(set) var device: String?
    /// Bytes per second; 0 and nil are no limit.
    package var readBytes: UInt64?
    /// Bytes per second; 0 and nil are no limit.
    package var writeBytes: UInt64?
    /// Per second; 0 and nil are no limit.
    package var readOperations: UInt64?
    /// Per second; 0 and nil are no limit.
    package var writeOperations: UInt64?
    /// Milliseconds of each rate that may be saved up; nil for the default.
    package var burst: UInt64?
    /// What to run instead of the volume's file in the folder of hooks: an absolute path, or `none`.
    package private(set) var hook: String?
    /// Nil for the default.
    package private(set) var hookTimeout: Duration?

    package init(_ name: VolumeName) { self.name = name }

    /// Sets what one `key=value` of a line says.
    ///
    /// - Parameter spelling: how errors name the key; nil for its name.
    package mutating func set(
        _ key: MapKey, to value: String, as spelling: String? = nil
    ) throws(ConfigurationError) {
        let text = spelling ?? key.rawValue
        guard !value.isEmpty else {
            throw ConfigurationError("'\(text)' has no value; write \(text)=VALUE, or leave it out")
        }
        switch key {
        case .config:
            config = try Value.path(value, of: text)
            guard !value.contains(" ") else {
                throw ConfigurationError(
                    "'\(text)' is \(excerpt(value)); it cannot hold a blank, because the fields of 'qbd list' end at blanks"
                )
            }
        case .export: export = try Value.flag(value, of: text)
        case .readOnly: readOnly = try Value.flag(value, of: text)
        case .device: device = try Value.path(value, of: text)
        case .readBytes: readBytes = try Value.rate(bytesPerSecond: value, of: text)
        case .writeBytes: writeBytes = try Value.rate(bytesPerSecond: value, of: text)
        case .readOperations: readOperations = try Value.rate(operationsPerSecond: value, of: text)
        case .writeOperations: writeOperations = try Value.rate(operationsPerSecond: value, of: text)
        case .burst: burst = try Value.burst(value, of: text)
        case .hook: hook = value == Self.noHook ? value : try Value.path(value, of: text)
        case .hookTimeout: hookTimeout = try Value.seconds(value, of: text)
        }
    }

    /// As the value of `hook`: nothing is run.
    package static let noHook = "none"

    /// What contradicts itself.
    package func validate() throws(ConfigurationError) {
        guard !export || device == nil else {
            throw ConfigurationError("an export has no device, so 'device' does not go with 'export'")
        }
    }

    /// The value of a key as a line has it; nil where the line says nothing.
    func value(of key: MapKey) -> String? {
        switch key {
        case .config: config
        case .export: export ? "1" : nil
        case .readOnly: readOnly ? "1" : nil
        case .device: device
        case .readBytes: readBytes.map { "\($0)" }
        case .writeBytes: writeBytes.map { "\($0)" }
        case .readOperations: readOperations.map { "\($0)" }
        case .writeOperations: writeOperations.map { "\($0)" }
        case .burst: burst.map { "\($0)" }
        case .hook: hook
        case .hookTimeout: hookTimeout.map { "\($0.components.seconds)" }
        }
    }
}
