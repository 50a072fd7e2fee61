import Configuration
import PureFlash

extension Conductor {
    /// Snapshots of a volume that are remembered as begun; those of older failures are forgotten.
    private static let maximumBegun = 32

    func createSnapshot(_ query: HTTPQuery) async throws(RefusedRequest) {
        let pool = try pool(query)
        let name = try volumeName(query)
        let wanted = query.parameters["snapshot_name"] ?? ""
        do throws(ConfigurationError) { try VolumeName.validate(component: wanted, as: "snapshot_name") } catch {
            throw RefusedRequest(.invalidArgument, "\(error)")
        }
        let (record, known) = try await found(pool, name)
        var entry = known
        guard !entry.snapshots.contains(where: { $0.name == wanted }) else {
            throw RefusedRequest(.alreadyDone, "\(pool.name)/\(name)@\(wanted) exists already")
        }
        var order = order("create_snapshot", pool, name, size: record.size, entry)
        let holders = Set(entry.stores.prefix(order.shardCount))
        let pause = faults?.value(.apart) ?? 0
        guard holders.count == 1 || pause > 0 else {
            throw RefusedRequest(
                .invalidState,
                "\(pool.name)/\(name) lies on \(holders.count) stores, which cannot make one snapshot at one moment")
        }
        order.snapshotName = wanted
        order.replaces = entry.begun.contains(wanted)
        // Known before the store knows it: one that is made and not noted here could be neither opened nor made again.
        if order.replaces == false {
            entry.begun = entry.begun.suffix(Self.maximumBegun - 1) + [wanted]
            try await keep(entry, pool, name)
        }
        do throws(RefusedRequest) {
            if pause > 0 {
                try await makeApart(order, holders.sorted(), pause, &entry, pool)
            } else {
                try await require(order, of: Array(holders))
            }
        } catch {
            if error.code == .alreadyDone, order.replaces == false {
                // Somebody else's, which no later try is to replace.
                entry.begun.removeAll { $0 == wanted }
                try await keep(entry, pool, name)
            }
            throw error
        }
        entry.begun.removeAll { $0 == wanted }
        entry.snapshots.append(.init(name: wanted, number: entry.nextSnapshot, size: record.size))
        entry.nextSnapshot += 1
        try await keep(entry, pool, name)
        logger.info("made the snapshot \(pool.name)/\(name)@\(wanted)")
    }

    /// One store after the other, with time between them in which writes are acknowledged.
    /// - Parameter pause: milliseconds.
    private func makeApart(
        _ order: VolumeOrder, _ stores: [String], _ pause: Int, _ entry: inout StorePool.Entry, _ pool: StorePool
    ) async throws(RefusedRequest) {
        for (number, store) in stores.enumerated() {
            // Only cancellation ends it early, and nobody cancels this.
            if number > 0 { try? await Task.sleep(nanoseconds: UInt64(pause) * 1_000_000) }
            do throws(RefusedRequest) { try await require(order, of: [store]) } catch {
                if error.code == .remote { try await writeOff(store, of: &entry, pool, order.volumeName) }
                throw error
            }
        }
    }

    func deleteSnapshot(_ query: HTTPQuery) async throws(RefusedRequest) {
        let pool = try pool(query)
        let name = try volumeName(query)
        let wanted = query.parameters["snapshot_name"] ?? ""
        let (record, known) = try await found(pool, name)
        var entry = known
        guard let index = entry.snapshots.firstIndex(where: { $0.name == wanted }) else {
            throw RefusedRequest(.invalidArgument, "volume \(pool.name)/\(name) has no snapshot: '\(wanted)'")
        }
        var order = order("delete_snapshot", pool, name, size: record.size, entry)
        order.snapshotName = wanted
        order.snapSeq = Int64(entry.snapshots[index].number)
        try await require(order, of: Array(Set(entry.stores.prefix(order.shardCount))))
        entry.snapshots.remove(at: index)
        try await keep(entry, pool, name)
        logger.info("deleted the snapshot \(pool.name)/\(name)@\(wanted)")
    }
}
