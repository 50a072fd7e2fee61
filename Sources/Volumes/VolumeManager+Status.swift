import Backend
import Glibc

// What is mapped, and how it does.
extension VolumeManager {
    /// Ordered by device id. What waits to be taken over is there, too.
    package func list() async -> [MappedVolume] {
        let (mappings, leftovers) = state.withLock { (Array($0.mappings.values), Array($0.leftovers.values)) }
        var list = leftovers.compactMap { describe($0)?.mapping }
        for mapping in mappings { list.append(await describe(mapping)) }
        return list.sorted { $0.deviceID < $1.deviceID }
    }

    /// - Returns: nil when it is neither mapped nor being mapped.
    package func configPath(pool: String, volume: String) -> String? {
        let name = "\(pool)/\(volume)"
        return mapping(name)?.options.configPath ?? leftover(name)?.document?.config
            ?? state.withLock { $0.pending[name]?.first?.configPath }
    }

    package func info(pool: String, volume: String) async throws(BackendError) -> VolumeStatus {
        let name = "\(pool)/\(volume)"
        guard let mapping = mapping(name), let status = await mapping.volume.status() else {
            guard let status = leftover(name).flatMap({ describe($0) }) else { throw notMapped(name) }
            return status
        }
        return VolumeStatus(
            mapping: describe(mapping, status), counters: status.counters, inFlight: status.inFlight,
            heldBack: status.heldBack,
            readLatency: status.readLatency, writeLatency: status.writeLatency, flushLatency: status.flushLatency,
            clients: status.clients, cluster: status.cluster, waits: status.cluster?.waits,
            space: room(of: mapping.pool))
    }

    func describe(_ mapping: Mapping) async -> MappedVolume {
        describe(mapping, await mapping.volume.status())
    }

    private func describe(_ mapping: Mapping, _ status: VolumeLoopStatus?) -> MappedVolume {
        MappedVolume(
            deviceID: mapping.deviceID, pool: mapping.pool.name, record: mapping.volume.opened.record,
            device: mapping.device?.name,
            configPath: mapping.options.configPath, readOnly: mapping.options.readOnly,
            protocolName: mapping.volume.opened.protocolName,
            uri: uri(mapping.volume.name),
            limits: mapping.settings.limits, state: status?.state ?? .normal,
            health: status?.health ?? .failed, healthSince: status?.healthSince ?? 0,
            flushesFailSince: status?.flushesFailSince, since: status?.since ?? 0,
            connections: status?.connections ?? 0)
    }

    /// What its document and its device tell; nil when nobody waits for it.
    private func describe(_ leftover: Leftover) -> VolumeStatus? {
        guard let document = leftover.document, leftover.isKept else { return nil }
        let settings = VolumeSettings(document)
        let nothing = LatencySummary(count: 0, p50: 0, p90: 0, p99: 0, p999: 0, maximum: 0)
        let mapped = MappedVolume(
            deviceID: leftover.deviceID, pool: document.pool,
            record: VolumeRecord(
                id: document.volumeID, volume: document.volume, size: leftover.size, blockSize: 0, created: nil),
            device: leftover.device?.name, configPath: document.config, readOnly: document.readOnly,
            protocolName: "-", uri: uri(document.name), limits: settings.limits, state: settings.gate,
            health: leftover.isAwaited ? .reconnecting : .failed, healthSince: leftover.since,
            flushesFailSince: settings.flushesFailSince,
            since: settings.gateSince, connections: 0)
        return VolumeStatus(
            mapping: mapped, counters: VolumeCounters(), inFlight: 0, heldBack: HeldBack(), readLatency: nothing,
            writeLatency: nothing, flushLatency: nothing, clients: [], cluster: nil,
            waits: "not taken over from the daemon before"
                + "\(leftover.isAwaited ? " yet" : "")\(leftover.problem.map { ": \($0.message)" } ?? "")",
            space: nil)
    }

    private func uri(_ name: String) -> String { "nbd+unix:///\(name)?socket=\(Self.encoded(nbdSocketPath))" }

    /// Percent-encoded for the query of a URI (RFC 3986, 3.4).
    private static func encoded(_ path: String) -> String {
        path.utf8.reduce(into: "") { text, byte in
            switch byte {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "/"), UInt8(ascii: "."), UInt8(ascii: "_"),
                UInt8(ascii: "-"), UInt8(ascii: "~"):
                text.unicodeScalars.append(Unicode.Scalar(byte))
            default: text += "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16, uppercase: true)
            }
        }
    }
}
