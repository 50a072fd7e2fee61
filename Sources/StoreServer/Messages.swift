import Backend
import FoundationEssentials
import Glibc
import PureFlash

/// Why a conductor or a store does not do what it is asked for.
package struct RefusedRequest: Error, Sendable, CustomStringConvertible {
    /// PureFlash's codes.
    package enum Code: Int, Codable, Sendable {
        case failed = 1
        case invalidArgument = 2
        case remote = 5
        case alreadyDone = 6
        case invalidState = 7
    }

    package let code: Code
    package let reason: String

    package init(_ code: Code, _ reason: String) {
        self.code = code
        self.reason = reason
    }

    package init(_ error: BackendError) {
        let code: Code =
            switch error.code {
            case EEXIST: .alreadyDone
            case ENOENT, EINVAL: .invalidArgument
            case EBUSY: .invalidState
            default: .failed
            }
        self.init(code, error.message)
    }

    package var description: String { reason }
}

enum StoreJSON {
    static func encode(_ value: some Encodable) -> String {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        // Integers and text: there is nothing that JSON has no words for.
        guard let data = try? encoder.encode(value) else { preconditionFailure("an answer cannot be put into JSON") }
        return String(decoding: data, as: UTF8.self)
    }

    static func decode<Value: Decodable>(_ type: Value.Type, from bytes: [UInt8]) throws(RefusedRequest) -> Value {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        do { return try decoder.decode(type, from: Data(bytes)) } catch {
            throw RefusedRequest(.invalidArgument, "the body was not understood: \(error)")
        }
    }
}

/// An answer without contents, and every refusal.
struct PlainAnswer: Codable, Sendable {
    var op: String
    var retCode: Int
    var reason: String?
}

/// What a conductor tells a store about a volume, in the form of prepare_volume.
package struct VolumeOrder: Codable, Sendable {
    package struct Shard: Codable, Sendable {
        package var index: Int
        package var replicas: [Replica]
        package var primaryRepIndex = 0
        package var status = "OK"
    }

    package struct Replica: Codable, Sendable {
        package var id: UInt64
        package var index = 0
        package var storeId: Int
        package var status = "OK"
        /// The store's address.
        package var repPorts: String
    }

    package var op: String
    package var status = "OK"
    /// PureFlash's own conductor names none.
    package var tenantName: String?
    package var volumeName: String
    package var volumeSize: UInt64
    package var volumeId: UInt64
    package var shardCount: Int
    package var repCount = 1
    package var metaVer: UInt16
    package var snapSeq: Int64 = 1
    package var shards: [Shard]
    package var features = 0
    /// The snapshot to make or to let be read, numbered `snapSeq`.
    package var snapshotName: String?
    /// A snapshot of this name was begun before, and nobody has seen it: it goes when it is there.
    package var replaces: Bool?

    /// What a request means that names no tenant.
    static let defaultTenant = "tenant_default"
    var tenant: String { tenantName ?? Self.defaultTenant }
}

struct OpenVolumeAnswer: Encodable {
    struct Shard: Encodable {
        var index: Int
        var storeIps: String
        var status: String
        var isShareddisk = 0
    }

    var status = "OK"
    var volumeName: String
    var volumeSize: UInt64
    var volumeId: UInt64
    var shardCount: Int
    var repCount = 1
    var metaVer: UInt16
    var snapSeq: Int64
    var shards: [Shard]
    /// log2 of the bytes of a shard, whatever its name says.
    var shardLbaCntOrder = 36
    /// A volume that grows gets shards. PureFlash's own conductor adds none, and does not say so.
    var addsShards: Int?
    var op = "open_volume_reply"
    var retCode = 0
}

struct CreateVolumeAnswer: Encodable {
    var id: UInt64
    var name: String
    var size: UInt64
    var status = "OK"
    var repCount = 1
    var op = "create_volume_reply"
    var retCode = 0
}

struct ListVolumeAnswer: Encodable, Sendable {
    struct Volume: Encodable {
        var id: UInt64
        var name: String
        var size: UInt64
        var iops = 0
        var cbs = 0
        var bw = 0
        var status = "OK"
        var tenantId: Int
        var quotasetId = 0
        var exposed: Int
        var repCount = 1
        var shardSize: UInt64
        var metaVer: UInt16
        var snapSeq: Int64
    }

    var volumes: [Volume]
    var op = "list_volume_reply"
    var retCode = 0
}

struct ListTenantAnswer: Encodable {
    struct Tenant: Encodable {
        var id: Int
        var name: String
    }

    var tenants: [Tenant]
    var op = "list_tenant_reply"
    var retCode = 0
}

struct ListStoreAnswer: Encodable {
    struct Store: Encodable {
        var id: Int
        var mngtIp: String
        var status: String
    }

    var storeNodes: [Store]
    var op = "list_store_reply"
    var retCode = 0
}

struct ListDiskAnswer: Encodable {
    struct Disk: Encodable {
        var storeId: Int
        var device: String
        var totalCapacity: UInt64
        var freeSize: UInt64
        var objectSize: UInt64
        var status = "OK"
    }

    var disks: [Disk]
    var op = "list_disk_reply"
    var retCode = 0
}

struct HandleErrorAnswer: Encodable, Sendable {
    var metaVer: UInt16
    /// REOPEN.
    var actionCode = 0x4000
    var op = "handle_error_reply"
    var retCode = 0
}

struct FaultsAnswer: Encodable {
    var faults: [String: Int]
    var seen: [String: Int]
    var retCode = 0
}
