import Backend
import FoundationEssentials
import Glibc

/// What a conductor says of a volume it has opened: where each shard is served, and by which version of that.
package struct VolumeLayout: Equatable, Sendable {
    package struct Shard: Equatable, Sendable {
        /// IP addresses of the stores that have it, the primary's first; empty while no replica is usable.
        package let addresses: [String]

        package init(addresses: [String]) { self.addresses = addresses }
    }

    package let id: UInt64
    /// Bytes, as far as there are shards for them.
    package let size: UInt64
    /// Bytes, as the conductor has it: more than `size` when it has made a volume larger and no shards for that.
    package let recordedSize: UInt64
    package let metaVersion: UInt16
    /// What commands name: a snapshot's number, or `StoreProtocol.head`.
    package let snapshot: UInt32
    /// By index: shard `n` has the bytes from `n` times `StoreProtocol.shardSize` on.
    package let shards: [Shard]
    /// The largest size in bytes that the conductor can give the volume. PureFlash's own adds no shards: asked for more
    /// than those hold, it writes down a size that is not there.
    package let sizeLimit: UInt64

    /// - Parameters:
    ///   - size: bytes, as the conductor has it.
    ///   - sizeLimit: nil for what the shards hold.
    package init(
        id: UInt64, size: UInt64, metaVersion: UInt16, snapshot: UInt32, shards: [Shard], sizeLimit: UInt64? = nil
    ) {
        self.sizeLimit = sizeLimit ?? UInt64(shards.count) * StoreProtocol.shardSize
        self.id = id
        recordedSize = size
        self.size = min(size, UInt64(shards.count) * StoreProtocol.shardSize)
        self.metaVersion = metaVersion
        self.snapshot = snapshot
        self.shards = shards
    }

    /// The addresses of the stores that nothing can replace: they have the only replica of a shard.
    package var irreplaceable: Set<String> {
        Set(shards.lazy.filter { $0.addresses.count == 1 }.map { $0.addresses[0] })
    }

    /// - Parameter body: of the answer to open_volume.
    /// - Throws: the conductor's refusal; EPROTO for what is not understood.
    package init(decoding body: [UInt8]) throws(BackendError) {
        self = try ConductorStatus.decode(OpenVolumeAnswer.self, "open_volume", body).layout()
    }
}

/// A conductor's answer to any request; `Answer` adds what the request asked for.
package struct ConductorStatus: Decodable {
    let code: Int
    let reason: String?

    enum CodingKeys: String, CodingKey {
        case code = "ret_code"
        case reason
    }

    /// What a conductor has answered to an operation.
    /// - Throws: its refusal; EPROTO for what is no answer.
    package static func decode<Answer: Decodable>(
        _ type: Answer.Type, _ operation: String, _ body: [UInt8]
    ) throws(BackendError) -> Answer {
        do {
            let decoder = JSONDecoder()
            let data = Data(body)
            let status = try decoder.decode(ConductorStatus.self, from: data)
            guard status.code == 0 else { throw refusal(operation, status) }
            return try decoder.decode(type, from: data)
        } catch let error as BackendError {
            throw error
        } catch {
            throw BackendError(
                code: EPROTO, message: "the conductor's answer to \(operation) was not understood: \(fault(error))")
        }
    }

    private static func fault(_ error: any Error) -> String {
        func place(_ context: DecodingError.Context, _ last: (any CodingKey)? = nil) -> String {
            let path = (context.codingPath + (last.map { [$0] } ?? [])).map(\.stringValue).joined(separator: ".")
            return path.isEmpty ? "it" : path
        }
        return switch error {
        case DecodingError.keyNotFound(let key, let context): "\(place(context, key)) is missing"
        case DecodingError.typeMismatch(let type, let context): "\(place(context)) is no \(type)"
        case DecodingError.valueNotFound(_, let context): "\(place(context)) is null"
        case DecodingError.dataCorrupted(let context) where !context.codingPath.isEmpty:
            "\(place(context)) is no value of its kind"
        default: "it is no JSON, or has a number that is out of range"
        }
    }

    /// A conductor's codes: 0 ok, 1 invalid operation or exception, 2 invalid argument, 3 duplicated node, 4 database,
    /// 5 remote, 6 already done, 7 invalid state.
    private static func refusal(_ operation: String, _ status: ConductorStatus) -> BackendError {
        let reason = status.reason.map { ": \($0.prefix(400))" } ?? ""
        let code: Int32 =
            switch status.code {
            case 2: meaning(operation, status.reason ?? "")
            case 3, 6: EEXIST
            case 7: EBUSY
            default: EREMOTEIO
            }
        return BackendError(code: code, message: "the conductor refused \(operation) (\(status.code))\(reason)")
    }

    /// Of "invalid argument". A conductor answers open_volume with it also while a store is not ready.
    private static func meaning(_ operation: String, _ reason: String) -> Int32 {
        switch operation {
        case "create_volume" where reason.contains("already exist"),
            "create_snapshot" where reason.contains("already exist"):
            EEXIST
        // Of the tenant; that a store is full is not looked at there.
        case "create_volume" where reason.contains("capacity"): ENOSPC
        case "create_volume" where reason.contains("only 0 stores"): EHOSTDOWN
        case "delete_snapshot" where reason.contains("ongoing"): EBUSY
        case "create_volume" where !["no tenant", "not exist"].contains(where: reason.contains): EINVAL
        case "open_volume"
        where !["not exist", "no volume", "no tenant", "no snapshot"].contains(where: reason.contains):
            EHOSTDOWN
        default: ENOENT
        }
    }
}

/// `open_volume_reply`, as recorded.
struct OpenVolumeAnswer: Decodable {
    struct Shard: Decodable {
        let index: Int
        /// Separated by commas.
        let addresses: String

        enum CodingKeys: String, CodingKey {
            case index
            case addresses = "store_ips"
        }
    }

    let size: UInt64
    let id: UInt64
    let shardCount: Int
    let metaVersion: Int
    let snapshot: Int64
    let shards: [Shard]
    /// log2 of a shard's bytes.
    let shardOrder: Int?
    /// Not 0: it adds shards to a volume that grows. Only a conductor of ours says so.
    let addsShards: Int?

    enum CodingKeys: String, CodingKey {
        case size = "volume_size"
        case id = "volume_id"
        case shardCount = "shard_count"
        case metaVersion = "meta_ver"
        case snapshot = "snap_seq"
        case shards
        case shardOrder = "shard_lba_cnt_order"
        case addsShards = "adds_shards"
    }

    /// - Throws: EPROTO with what is wrong: data is never written by a layout that is not understood.
    func layout() throws(BackendError) -> VolumeLayout {
        guard size > 0, size % UInt64(StoreProtocol.sector) == 0, size <= StoreProtocol.maximumVolume else {
            throw Self.wrong("a volume size of \(size)")
        }
        guard id > 0, id % StoreProtocol.volumeIDUnit == 0 else { throw Self.wrong("the volume id \(id)") }
        if let shardOrder, UInt64(1) << UInt64(clamping: min(max(shardOrder, 0), 63)) != StoreProtocol.shardSize {
            throw Self.wrong("shards of 2^\(shardOrder) bytes")
        }
        // There may be too few of them, or too many: a conductor makes a volume larger or smaller, and its shards stay.
        let needed = (size - 1) / StoreProtocol.shardSize + 1
        guard !shards.isEmpty, shardCount == shards.count else {
            throw Self.wrong("\(shards.count) shards, shard_count \(shardCount), of a volume of \(size) bytes")
        }
        let sorted = shards.sorted { $0.index < $1.index }
        guard sorted.map(\.index) == Array(0..<sorted.count) else {
            let first = sorted.prefix(16).map { "\($0.index)" }.joined(separator: ", ")
            throw Self.wrong("the shards \(first)\(sorted.count > 16 ? ", ..." : "")")
        }
        // A snapshot has a number from 1 on: a store gives zeros for 0.
        guard let snapshot = snapshot == -1 ? StoreProtocol.head : UInt32(exactly: snapshot), snapshot > 0 else {
            throw Self.wrong("snap_seq \(snapshot)")
        }
        var known: [VolumeLayout.Shard] = []
        for shard in sorted.prefix(Int(clamping: needed)) {
            let addresses = shard.addresses.split(separator: ",").map { String($0.filter { $0 != " " }) }
            for address in addresses where StoreAddress(address) == nil {
                throw Self.wrong("'\(address.prefix(64))' for the address of a store")
            }
            known.append(VolumeLayout.Shard(addresses: addresses))
        }
        return VolumeLayout(
            id: id, size: size, metaVersion: UInt16(truncatingIfNeeded: metaVersion), snapshot: snapshot, shards: known,
            sizeLimit: addsShards ?? 0 != 0
                ? StoreProtocol.maximumVolume : UInt64(clamping: shardCount) * StoreProtocol.shardSize)
    }

    private static func wrong(_ what: String) -> BackendError {
        BackendError(code: EPROTO, message: "the conductor's answer to open_volume has \(what)")
    }
}

/// `create_volume_reply`, as recorded.
struct CreateVolumeAnswer: Decodable {
    let id: UInt64
    let size: UInt64
}

/// `list_volume_reply`.
struct ListVolumeAnswer: Decodable {
    struct Volume: Decodable {
        let id: UInt64
        let name: String
        let size: UInt64
    }
    let volumes: [Volume]
}

/// `list_store_reply`.
package struct ListStoreAnswer: Decodable, Sendable {
    private struct Store: Decodable {
        /// Its IP address, where the conductor reaches its HTTP port.
        let address: String
        let status: String

        enum CodingKeys: String, CodingKey {
            case address = "mngt_ip"
            case status
        }
    }

    /// Stores that are taken from one answer.
    package static let maximumStores = 1024

    /// The addresses of those that the conductor believes alive: it knows nothing else of them.
    package let alive: Set<String>

    private enum CodingKeys: String, CodingKey {
        case stores = "store_nodes"
    }

    package init(from decoder: any Decoder) throws {
        let stores = try decoder.container(keyedBy: CodingKeys.self).decode([Store].self, forKey: .stores)
        let believed = stores.lazy.filter { $0.status == "OK" && StoreAddress($0.address) != nil }
        alive = Set(believed.prefix(Self.maximumStores).map(\.address))
    }
}

/// `list_tenant_reply`.
struct ListTenantAnswer: Decodable {
    struct Tenant: Decodable {
        let name: String
    }
    let tenants: [Tenant]
}

/// An IP address with the port that all stores listen on.
package struct StoreAddress: Sendable {
    package let storage: sockaddr_storage
    package let length: socklen_t
    package var family: Int32 { Int32(storage.ss_family) }

    /// - Parameter text: IPv4 or IPv6, without a port; nil for anything else.
    package init?(_ text: String, port: UInt16 = StoreProtocol.port) {
        var storage = sockaddr_storage()
        var four = sockaddr_in()
        var six = sockaddr_in6()
        if inet_pton(AF_INET, text, &four.sin_addr) == 1 {
            four.sin_family = sa_family_t(AF_INET)
            four.sin_port = port.bigEndian
            withUnsafeMutableBytes(of: &storage) { storage in
                withUnsafeBytes(of: four) { storage.copyMemory(from: $0) }
            }
            length = socklen_t(MemoryLayout<sockaddr_in>.size)
        } else if inet_pton(AF_INET6, text, &six.sin6_addr) == 1 {
            six.sin6_family = sa_family_t(AF_INET6)
            six.sin6_port = port.bigEndian
            withUnsafeMutableBytes(of: &storage) { storage in
                withUnsafeBytes(of: six) { storage.copyMemory(from: $0) }
            }
            length = socklen_t(MemoryLayout<sockaddr_in6>.size)
        } else {
            return nil
        }
        self.storage = storage
    }

    /// Whether a socket that is connected to it does not leave this host: its own end has the same address, or one of the
    /// loopback interface.
    package func isReachedWithin(_ descriptor: Int32) -> Bool {
        var own = sockaddr_storage()
        var size = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let isKnown = withUnsafeMutablePointer(to: &own) { own in
            own.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(descriptor, $0, &size) == 0 }
        }
        guard isKnown, own.ss_family == storage.ss_family else { return false }
        return Self.host(own).elementsEqual(Self.host(storage)) || Self.host(own).first == 127 && family == AF_INET
    }

    /// The bytes of the address, without its port.
    private static func host(_ address: sockaddr_storage) -> [UInt8] {
        withUnsafeBytes(of: address) { bytes in
            address.ss_family == sa_family_t(AF_INET) ? Array(bytes[4..<8]) : Array(bytes[8..<24])
        }
    }
}
