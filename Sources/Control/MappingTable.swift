/// The documented output of `qbd list`, which scripts split on blanks: the header, one line for each mapped volume,
/// nothing else.
package enum MappingTable {
    private static let header = [
        "dev_id", "vol_id", "device", "volume", "config", "read_bps", "write_bps", "read_iops", "write_iops",
    ]

    /// - Parameter long: with two more columns, the state and the health.
    package static func text(_ mappings: [MappingRecord], long: Bool = false) -> String {
        let rows = mappings.map { mapping in
            [
                String(mapping.deviceID), mapping.volumeID, mapping.device, mapping.volume, mapping.config,
                String(mapping.limits.readBytes), String(mapping.limits.writeBytes),
                String(mapping.limits.readOperations), String(mapping.limits.writeOperations),
            ] + (long ? [mapping.state, mapping.health] : [])
        }
        return ([header + (long ? ["state", "health"] : [])] + rows).map { line($0) + "\n" }.joined()
    }

    /// The original's fields end at tab stops of four columns, its tabs written as blanks.
    private static func line(_ fields: [String]) -> String {
        fields.dropLast().map { $0 + String(repeating: " ", count: 4 - $0.utf8.count % 4) }.joined()
            + (fields.last ?? "")
    }
}
