import Backend

extension PureFlashVolume {
    /// Nanoseconds without an answer from which on it is told that a request waits.
    private static let patience: UInt64 = 1_000_000_000

    var report: ClusterReport? {
        let shards = layout.shards.enumerated().map { index, shard in
            ClusterReport.Shard(
                addresses: shard.addresses,
                store: routes[index] >= 0 ? connections[routes[index]].name : shard.addresses.first)
        }
        var names: [String] = []
        for name in layout.shards.flatMap(\.addresses) + connections.map(\.name) where !names.contains(name) {
            names.append(name)
        }
        return ClusterReport(conductor: opened.conductor, shards: shards, stores: names.map(store), waits: waits)
    }

    private func store(_ name: String) -> ClusterReport.Store {
        let own = connections.filter { $0.name == name }
        let ready = own.count { $0.state == .ready }
        let trouble = own.lazy.compactMap(\.lastFailure).first
        let state: ClusterReport.StoreState =
            if ready > 0 {
                .connected
            } else if trouble != nil {
                .lost
            } else if own.contains(where: { $0.state != .closed }) {
                .connecting
            } else {
                .unused
            }
        return ClusterReport.Store(
            address: name, state: state, connections: ready, requests: own.reduce(0) { $0 + $1.inFlight },
            trouble: trouble)
    }

    private var waits: String? {
        guard let oldest else { return nil }
        let arrival = oldest.pointee.deadline &- settings.ioTimeout
        let age = loop.now > arrival ? loop.now - arrival : 0
        guard trouble != nil || age >= Self.patience else { return nil }
        let shard = Int(oldest.pointee.shard)
        let reason =
            if layout.shards[shard].addresses.isEmpty {
                "no store serves shard \(shard) now; look at the stores"
            } else if let trouble {
                trouble
            } else if routes[shard] >= 0 {
                "the store \(connections[routes[shard]].name) does not answer"
            } else {
                "its store does not answer"
            }
        let count = waiting == 1 ? "a request waits" : "\(waiting) requests wait, the oldest"
        let tenths = age / 100_000_000
        return "\(count) for \(tenths / 10).\(tenths % 10) s: \(reason)"
    }
}
