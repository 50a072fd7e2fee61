import FoundationEssentials
import Glibc
import NIOCore

/// JSON as it goes over the control socket and to stdout.
package enum ControlJSON {
    /// One line, keys in order.
    package static func compact(_ value: some Encodable) throws(ControlError) -> String {
        try encode(value, [.sortedKeys, .withoutEscapingSlashes])
    }

    /// For people and scripts: indented, keys in order, with a line end.
    package static func pretty(_ value: some Encodable) throws(ControlError) -> String {
        try encode(value, [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]) + "\n"
    }

    private static func encode(
        _ value: some Encodable, _ formatting: JSONEncoder.OutputFormatting
    ) throws(ControlError) -> String {
        let encoder = JSONEncoder()
        encoder.outputFormatting = formatting
        do {
            return String(decoding: try encoder.encode(value), as: UTF8.self)
        } catch {
            throw ControlError(EPROTO, "cannot put the answer into JSON: \(error)")
        }
    }

    static func decode<Value: Decodable>(_ type: Value.Type, from buffer: ByteBuffer) throws -> Value {
        try JSONDecoder().decode(type, from: Data(buffer.readableBytesView))
    }

    /// One short sentence about why JSON was not understood.
    static func reason(_ error: any Error) -> String {
        func path(_ context: DecodingError.Context) -> String {
            context.codingPath.map(\.stringValue).joined(separator: ".")
        }
        switch error {
        case DecodingError.keyNotFound(let key, _): return "the field '\(key.stringValue)' is missing"
        case DecodingError.typeMismatch(_, let context), DecodingError.valueNotFound(_, let context):
            return context.codingPath.isEmpty ? "it is not an object" : "the field '\(path(context))' has a wrong type"
        case DecodingError.dataCorrupted(let context) where !context.codingPath.isEmpty:
            return "the field '\(path(context))' is out of range"
        default: return "it is not JSON"
        }
    }
}

/// How an error looks on the wire.
struct ErrorDocument: Codable, Sendable {
    struct Body: Codable, Sendable {
        /// The errno.
        var code: Int32
        /// The sentence for people.
        var message: String
        /// The command's name; nil when the request named none.
        var command: String?
    }
    var error: Body
}
