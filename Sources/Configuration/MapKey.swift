/// What a line of map.conf can say of a volume. Every key has its option of `qbd map`, and the other way round.
package enum MapKey: String, CaseIterable, Sendable {
    case config
    case export
    case readOnly = "readonly"
    case device
    case readBytes = "read_bps"
    case writeBytes = "write_bps"
    case readOperations = "read_iops"
    case writeOperations = "write_iops"
    case burst = "burst_ms"
    case hook
    case hookTimeout = "hook_timeout"

    /// For error texts: "config, export, ... or hook_timeout".
    static let all =
        allCases.dropLast().map(\.rawValue).joined(separator: ", ") + " or " + allCases[allCases.count - 1].rawValue
}
