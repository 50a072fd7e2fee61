/// The output of `qbd volumes`: a header and a line for each volume of a pool, fields separated by blanks, none of
/// them empty or with a blank in it.
package enum VolumeTable {
    package static func text(_ volumes: [PoolVolume]) -> String {
        let header = ["vol_id", "volume", "size", "block_size", "created"]
        let rows = volumes.map { volume in
            [
                volume.volumeID, volume.volume, String(volume.size), String(volume.blockSize),
                volume.created.map { Calendar.text($0) } ?? "-",
            ]
        }
        return Columns.text([header] + rows)
    }
}

/// Lines of fields, each column as wide as its widest field.
enum Columns {
    static func text(_ lines: [[String]]) -> String {
        var widths: [Int] = []
        for line in lines {
            for (index, field) in line.enumerated() {
                if index == widths.count { widths.append(0) }
                widths[index] = max(widths[index], field.utf8.count)
            }
        }
        return lines.map { line in
            var text = ""
            for (index, field) in line.enumerated() {
                text += field
                guard index < line.count - 1 else { continue }
                text += String(repeating: " ", count: widths[index] - field.utf8.count + 2)
            }
            return text + "\n"
        }.joined()
    }
}
