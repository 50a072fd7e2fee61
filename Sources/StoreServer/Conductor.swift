import Backend
import Configuration
import EventLoop
import Glibc
import Logging
import PureFlash

/// Answers what PureFlash's conductor is asked, for the pools of one configuration. Its own pools are the catalogue;
/// the data of a shard is at the store that serves it. What waits for a disk runs aside.
actor Conductor {
    private let node: StoreNode
    private let caller: StoreCaller
    /// By name; a tenant's id is its place in the order of names, from 1.
    private let pools: [String: StorePool]
    /// Addresses for the shards of new volumes.
    private let stores: [String]
    let faults: Faults?
    /// Nil where there are no fault switches.
    private let beliefs: StoreBeliefs?
    private let looking: Task<Void, Never>?
    let logger: Logger
    private let turns = NameQueues()

    init(
        node: StoreNode, caller: StoreCaller, pools: [String: StorePool], stores: [String],
        faults: Faults?, logger: Logger
    ) {
        self.node = node
        self.caller = caller
        self.pools = pools
        self.stores = stores
        self.faults = faults
        self.logger = logger
        let beliefs = faults.map {
            StoreBeliefs(caller, stores: stores.filter { $0 != node.address }, faults: $0, logger: logger)
        }
        self.beliefs = beliefs
        looking = beliefs.map { beliefs in Task { await beliefs.run() } }
    }

    /// Asks no store any more when it returns, but for requests that go on.
    func stop() async {
        looking?.cancel()
        await looking?.value
    }

    /// The body of an answer, whatever the question. Questions about one volume are answered one after the other.
    func answer(_ query: HTTPQuery) async -> String {
        guard let volume = query.parameters["volume_name"] else { return await answerNow(query) }
        return await turns.run("\(Self.tenant(query))/\(volume)") { await self.answerNow(query) }
    }

    private func answerNow(_ query: HTTPQuery) async -> String {
        do throws(RefusedRequest) { return try await perform(query) } catch {
            logger.info("\(query.operation) refused: \(error)")
            return StoreJSON.encode(
                PlainAnswer(op: query.operation + "_reply", retCode: error.code.rawValue, reason: error.reason))
        }
    }

    private func perform(_ query: HTTPQuery) async throws(RefusedRequest) -> String {
        switch query.operation {
        case "open_volume": return StoreJSON.encode(try await open(query))
        case "create_volume": return StoreJSON.encode(try await create(query))
        case "delete_volume": try await delete(query)
        case "update_volume": try await update(query)
        case "list_volume": return StoreJSON.encode(try await list(query))
        case "create_snapshot": try await createSnapshot(query)
        case "delete_snapshot": try await deleteSnapshot(query)
        case "create_tenant", "delete_tenant": try changeTenant(query)
        case "list_tenant":
            return StoreJSON.encode(
                ListTenantAnswer(tenants: pools.keys.sorted().enumerated().map { .init(id: $0 + 1, name: $1) }))
        case "list_store":
            return StoreJSON.encode(
                ListStoreAnswer(
                    storeNodes: await storeNodes()))
        case "list_disk": return StoreJSON.encode(ListDiskAnswer(disks: try await disks()))
        case "handle_error": return StoreJSON.encode(try await handleError(query))
        case "": throw RefusedRequest(.failed, "the request names no operation; write /s5c/?op=OPERATION")
        default: throw RefusedRequest(.failed, "the conductor of qbd-store has no operation '\(query.operation)'")
        }
        return StoreJSON.encode(PlainAnswer(op: query.operation + "_reply", retCode: 0))
    }

    // MARK: Parameters

    private static func tenant(_ query: HTTPQuery) -> String {
        guard let name = query.parameters["tenant_name"], !name.isEmpty else { return VolumeOrder.defaultTenant }
        return name
    }

    func pool(_ query: HTTPQuery) throws(RefusedRequest) -> StorePool {
        let name = Self.tenant(query)
        guard let pool = pools[name] else {
            throw RefusedRequest(
                .invalidArgument,
                "no tenant '\(name)'; tenants are pools: add a section [pool.\(name)] to the configuration of qbd-store"
            )
        }
        return pool
    }

    func volumeName(_ query: HTTPQuery) throws(RefusedRequest) -> String {
        let name = query.parameters["volume_name"] ?? ""
        do throws(ConfigurationError) { try VolumeName.validate(component: name, as: "volume_name") } catch {
            throw RefusedRequest(.invalidArgument, "\(error)")
        }
        return name
    }

    private func number(_ name: String, _ query: HTTPQuery) throws(RefusedRequest) -> UInt64? {
        guard let text = query.parameters[name], !text.isEmpty else { return nil }
        guard let value = UInt64(text), value <= UInt64(Int64.max) else {
            throw RefusedRequest(.invalidArgument, "\(name) is '\(text)', which is no number")
        }
        return value
    }

    private func aside<Value: Sendable>(
        _ work: @escaping @Sendable () throws(BackendError) -> Value
    ) async throws(RefusedRequest) -> Value {
        do throws(BackendError) { return try await Aside.run(work) } catch { throw RefusedRequest(error) }
    }

    func found(
        _ pool: StorePool, _ volume: String
    ) async throws(RefusedRequest) -> (record: VolumeRecord, entry: StorePool.Entry) {
        try await aside { () throws(BackendError) in
            let record = try pool.record(volume)
            return (record, try pool.entry(record))
        }
    }

    func keep(_ entry: StorePool.Entry, _ pool: StorePool, _ volume: String) async throws(RefusedRequest) {
        try await aside { () throws(BackendError) in try pool.keep(entry, of: volume) }
    }

    // MARK: Orders for stores

    private static func shardCount(_ size: UInt64) -> Int {
        Int((size + StoreProtocol.shardSize - 1) / StoreProtocol.shardSize)
    }

    func order(
        _ operation: String, _ pool: StorePool, _ volume: String, size: UInt64, _ entry: StorePool.Entry
    ) -> VolumeOrder {
        let count = Self.shardCount(size)
        return VolumeOrder(
            op: operation, tenantName: pool.name, volumeName: volume, volumeSize: size, volumeId: entry.id,
            shardCount: count, metaVer: entry.metaVersion, snapSeq: Int64(entry.nextSnapshot),
            shards: (0..<count).map { index in
                let store = index % entry.stores.count
                return VolumeOrder.Shard(
                    index: index,
                    replicas: [
                        VolumeOrder.Replica(
                            id: entry.id | UInt64(index) << 4, storeId: store + 1, repPorts: entry.stores[store])
                    ])
            })
    }

    private enum Outcome: Sendable {
        case done
        case refused(RefusedRequest)
        case unreachable(StoreCaller.Unreachable)
    }

    private func send(_ order: VolumeOrder, to store: String) async -> Outcome {
        if store == node.address {
            do throws(RefusedRequest) {
                try await node.obey(order)
                return .done
            } catch { return .refused(error) }
        }
        do throws(StoreCaller.Unreachable) {
            guard let refusal = try await caller.send(order, to: store) else { return .done }
            return .refused(RefusedRequest(refusal.code, "the store \(store): \(refusal.reason)"))
        } catch {
            var unreachable = error
            // Its address may have been another one when the volume was made.
            if order.op != "create_volume", let path = pools[order.tenant]?.entryPath(order.volumeName) {
                let key = order.op == "withdraw_volume" ? "suspects" : "stores"
                unreachable.description += "; its address is from '\(key)' in \(path)"
            }
            logger.warning("\(unreachable)")
            return .unreachable(unreachable)
        }
    }

    private func send(_ order: VolumeOrder, toEach stores: [String]) async -> [String: Outcome] {
        await withTaskGroup(of: (String, Outcome).self) { group in
            for store in Set(stores) { group.addTask { (store, await self.send(order, to: store)) } }
            var outcomes: [String: Outcome] = [:]
            for await (store, outcome) in group { outcomes[store] = outcome }
            return outcomes
        }
    }

    /// All of them, or an error.
    func require(_ order: VolumeOrder, of stores: [String]) async throws(RefusedRequest) {
        for (_, outcome) in await send(order, toEach: stores) {
            switch outcome {
            case .done: break
            case .refused(let refusal): throw refusal
            case .unreachable(let why): throw RefusedRequest(.remote, why.description)
            }
        }
    }

    // MARK: Volumes

    private func open(_ query: HTTPQuery) async throws(RefusedRequest) -> OpenVolumeAnswer {
        faults?.count(.opens)
        let pool = try pool(query)
        let name = try volumeName(query)
        let (record, known) = try await found(pool, name)
        var entry = known
        var order = order("prepare_volume", pool, name, size: record.size, entry)
        var size = record.size
        var number: Int64 = -1
        if let wanted = query.parameters["snapshot_name"], !wanted.isEmpty {
            guard let snapshot = entry.snapshots.first(where: { $0.name == wanted }) else {
                throw RefusedRequest(.invalidArgument, "no snapshot '\(wanted)' of volume \(pool.name)/\(name)")
            }
            (size, number) = (snapshot.size, Int64(snapshot.number))
            order.snapshotName = snapshot.name
            order.snapSeq = number
        }
        let shardCount = min(Self.shardCount(size), entry.shards ?? .max)
        let holders = Array(entry.stores.prefix(shardCount))
        let told = await believed(holders)
        var usable = Set(holders).subtracting(told)
        for (store, outcome) in await send(order, toEach: told) {
            switch outcome {
            case .done: usable.insert(store)
            case .refused(let refusal): throw refusal
            case .unreachable: try await writeOff(store, of: &entry, pool, name)
            }
        }
        usable.subtract(entry.writtenOff)
        if faults?.isOn(.emptyStores) == true { usable = [] }
        return OpenVolumeAnswer(
            volumeName: name, volumeSize: size, volumeId: entry.id, shardCount: shardCount,
            metaVer: entry.metaVersion, snapSeq: number,
            shards: (0..<shardCount).map { index in
                let store = entry.stores[index % entry.stores.count]
                let works = usable.contains(store)
                return .init(index: index, storeIps: works ? store : "", status: works ? "OK" : "ERROR")
            }, addsShards: faults?.isOn(.damagingResize) == true ? nil : 1)
    }

    /// Those of the stores that are believed alive.
    private func believed(_ stores: [String]) async -> [String] {
        guard let beliefs, faults?.isOn(.belief) == true else { return stores }
        var alive: [String] = []
        for store in Set(stores).sorted() where await beliefs.believes(in: store) { alive.append(store) }
        return alive
    }

    private func storeNodes() async -> [ListStoreAnswer.Store] {
        let alive = await believed(stores)
        return stores.enumerated().map { number, address in
            .init(id: number + 1, mngtIp: address, status: alive.contains(address) ? "OK" : "OFFLINE")
        }
    }

    /// As PureFlash's own conductor does with a store that it believes in and that does not take an order: for good.
    func writeOff(
        _ store: String, of entry: inout StorePool.Entry, _ pool: StorePool, _ name: String
    ) async throws(RefusedRequest) {
        guard faults?.isOn(.belief) == true, !entry.writtenOff.contains(store) else { return }
        entry.writtenOff.append(store)
        logger.error("fault: \(store) is written off for \(pool.name)/\(name)")
        try await keep(entry, pool, name)
    }

    private func create(_ query: HTTPQuery) async throws(RefusedRequest) -> CreateVolumeAnswer {
        let pool = try pool(query)
        let name = try volumeName(query)
        guard let size = try number("size", query), size > 0, size % UInt64(StoreProtocol.sector) == 0 else {
            throw RefusedRequest(.invalidArgument, "size is missing, 0, or not a multiple of 512 bytes")
        }
        guard size <= StoreProtocol.maximumVolume else {
            throw RefusedRequest(.invalidArgument, "size is \(size) bytes; a volume has at most 2^56")
        }
        if let copies = try number("rep_cnt", query), copies != 1 {
            throw RefusedRequest(.invalidArgument, "rep_cnt is \(copies), and qbd-store keeps one copy of a volume")
        }
        _ = try await withdraw(pool, name)
        let record = try await aside { () throws(BackendError) in
            try pool.volumes.create(volume: name, size: size, blockSize: StoreProtocol.sector)
        }
        var created: [String] = []
        var suspects: [String] = []
        do throws(RefusedRequest) {
            // All of them, for when it grows.
            let stores = stores
            let entry = try await aside { () throws(BackendError) in
                var entry = try pool.entry(record)
                entry.stores = stores
                try pool.keep(entry, of: name)
                return entry
            }
            let order = order("create_volume", pool, name, size: size, entry)
            for store in Set(entry.stores) where store != node.address {
                switch await send(order, to: store) {
                case .done: created.append(store)
                case .refused(let refusal): throw RefusedRequest(.remote, refusal.reason)
                case .unreachable(let why):
                    if why.mayObey { suspects.append(store) }
                    throw RefusedRequest(.remote, why.description)
                }
            }
            logger.info("created \(pool.name)/\(name), \(size) bytes")
            return CreateVolumeAnswer(id: entry.id, name: name, size: size)
        } catch {
            await undoCreate(pool, name, record, created, suspects)
            throw error
        }
    }

    /// - Parameter suspects: stores that were told and may do it yet.
    private func undoCreate(
        _ pool: StorePool, _ name: String, _ record: VolumeRecord, _ created: [String], _ suspects: [String]
    ) async {
        do throws(RefusedRequest) {
            var entry = try await aside { () throws(BackendError) in try pool.entry(record) }
            entry.suspects = suspects
            for (store, outcome) in await send(
                order("delete_volume", pool, name, size: record.size, entry), toEach: created)
            {
                if case .done = outcome { continue }
                entry.suspects.append(store)
            }
            if !entry.suspects.isEmpty {
                try await keep(entry, pool, name)
                let stores = entry.suspects.joined(separator: ", ")
                logger.warning("\(pool.name)/\(name) may be left over at \(stores) until created or deleted again")
            }
            let hasSuspects = !entry.suspects.isEmpty
            try await aside { () throws(BackendError) in
                try pool.volumes.delete(volume: name, snapshots: false)
                if !hasSuspects { try pool.forget(name) }
            }
        } catch {
            logger.warning("\(pool.name)/\(name) is left over: \(error)")
        }
    }

    /// Has stores delete what they may have of a volume whose creation failed.
    /// - Returns: whether there was such a volume.
    private func withdraw(_ pool: StorePool, _ name: String) async throws(RefusedRequest) -> Bool {
        guard let found = try await aside({ () throws(BackendError) in try pool.leftover(name) }) else { return false }
        let order = order("withdraw_volume", pool, name, size: UInt64(StoreProtocol.sector), found)
        try await require(order, of: found.suspects)
        try await aside { () throws(BackendError) in try pool.forget(name) }
        return true
    }

    private func delete(_ query: HTTPQuery) async throws(RefusedRequest) {
        let pool = try pool(query)
        let name = try volumeName(query)
        if try await withdraw(pool, name) { return }
        let (record, entry) = try await found(pool, name)
        // Nothing goes before it is known that nobody uses it anywhere.
        try await require(order("release_volume", pool, name, size: record.size, entry), of: entry.stores)
        let others = entry.stores.filter { $0 != node.address }
        try await require(order("delete_volume", pool, name, size: record.size, entry), of: others)
        try await require(order("delete_volume", pool, name, size: record.size, entry), of: [node.address])
        try await aside { () throws(BackendError) in try pool.forget(name) }
        logger.info("deleted \(pool.name)/\(name)")
    }

    private func update(_ query: HTTPQuery) async throws(RefusedRequest) {
        let pool = try pool(query)
        let name = try volumeName(query)
        let (record, entry) = try await found(pool, name)
        if let new = query.parameters["new_volume_name"], !new.isEmpty, new != name {
            throw RefusedRequest(.invalidArgument, "qbd-store does not rename volumes")
        }
        for limit in ["iops", "bw"] where try number(limit, query) ?? 0 > 0 {
            throw RefusedRequest(.invalidArgument, "qbd-store does not limit volumes (\(limit)); see qbd throttle")
        }
        guard let mebibytes = try number("size", query) else { return }
        let (size, overflow) = mebibytes.multipliedReportingOverflow(by: 1 << 20)
        guard !overflow, size <= StoreProtocol.maximumVolume else {
            throw RefusedRequest(.invalidArgument, "size is \(mebibytes) MiB; a volume has at most 2^56 bytes")
        }
        if size == record.size { return }
        guard size > record.size else {
            throw RefusedRequest(
                .invalidArgument,
                "size is \(mebibytes) MiB and the volume has \(record.size) bytes: a volume can only grow")
        }
        if faults?.isOn(.damagingResize) == true {
            var entry = entry
            entry.shards = entry.shards ?? Self.shardCount(record.size)
            try await keep(entry, pool, name)
        }
        let order = order("resize_volume", pool, name, size: size, entry)
        // Its record here is what counts, and comes last: should one store fail, the old size is true everywhere.
        try await require(order, of: entry.stores.filter { $0 != node.address })
        try await require(order, of: [node.address])
        logger.info("\(pool.name)/\(name) has \(size) bytes now")
    }

    private func list(_ query: HTTPQuery) async throws(RefusedRequest) -> ListVolumeAnswer {
        let pool = try pool(query)
        let limit = try number("limit", query).map { Int(clamping: $0) } ?? .max
        let only = query.parameters["name"] ?? ""
        let tenant = (pools.keys.sorted().firstIndex(of: pool.name) ?? 0) + 1
        let (node, logger) = (node, logger)
        return try await aside { () throws(BackendError) in
            var volumes: [ListVolumeAnswer.Volume] = []
            for record in try pool.volumes.list() where only.isEmpty || record.volume == only {
                guard volumes.count < limit else { break }
                let entry: StorePool.Entry
                do throws(BackendError) { entry = try pool.entry(record) } catch {
                    // One that cannot be read hides no other.
                    guard only.isEmpty else { throw error }
                    logger.error("not listed: \(error.message)", metadata: ["volume": "\(pool.name)/\(record.volume)"])
                    continue
                }
                volumes.append(
                    .init(
                        id: entry.id, name: record.volume, size: record.size, tenantId: tenant,
                        exposed: node.volume(entry.id)?.name == "\(pool.name)/\(record.volume)" ? 1 : 0,
                        shardSize: StoreProtocol.shardSize, metaVer: entry.metaVersion,
                        snapSeq: Int64(entry.nextSnapshot)))
            }
            return ListVolumeAnswer(volumes: volumes)
        }
    }

    // MARK: The rest

    private func changeTenant(_ query: HTTPQuery) throws(RefusedRequest) {
        let name = Self.tenant(query)
        if query.operation == "create_tenant", pools[name] != nil {
            throw RefusedRequest(.alreadyDone, "the tenant '\(name)' exists already")
        }
        throw RefusedRequest(
            .invalidState,
            "tenants of qbd-store are the pools of its configuration; change the section [pool.\(name)] there and start it"
                + " again")
    }

    private func disks() async throws(RefusedRequest) -> [ListDiskAnswer.Disk] {
        let paths = pools.sorted(by: { $0.key < $1.key }).compactMap(\.value.path)
        return try await aside { () throws(BackendError) in try Self.disks(paths) }
    }

    private static func disks(_ paths: [String]) throws(BackendError) -> [ListDiskAnswer.Disk] {
        var disks: [ListDiskAnswer.Disk] = []
        for path in paths {
            var status = statvfs()
            guard statvfs(path, &status) == 0 else {
                // Made with the first volume.
                if errno == ENOENT { continue }
                throw BackendError(code: errno, message: "\(path): \(errnoText(errno))")
            }
            let unit = UInt64(status.f_frsize)
            disks.append(
                .init(
                    storeId: 1, device: path, totalCapacity: UInt64(status.f_blocks) * unit,
                    freeSize: UInt64(status.f_bavail) * unit, objectSize: StoreProtocol.objectSize))
        }
        return disks
    }

    private func handleError(_ query: HTTPQuery) async throws(RefusedRequest) -> HandleErrorAnswer {
        guard let replica = try number("rep_id", query) else {
            throw RefusedRequest(.invalidArgument, "rep_id is missing")
        }
        let id = replica & ~(StoreProtocol.volumeIDUnit - 1)
        let pools = pools
        return try await aside { () throws(BackendError) in
            var unknown: BackendError?
            for pool in pools.values {
                for record in try pool.volumes.list() {
                    do throws(BackendError) {
                        let entry = try pool.entry(record)
                        if entry.id == id { return HandleErrorAnswer(metaVer: entry.metaVersion) }
                    } catch { unknown = unknown ?? error }
                }
            }
            if let unknown { throw unknown }
            throw BackendError(code: EINVAL, message: "no volume has the replica \(replica)")
        }
    }

    /// Changes the version of a volume's layout, so that every client's view of it is stale. For a fault switch.
    func makeStale(tenant: String, volume: String) async throws(RefusedRequest) {
        let pool = try pool(HTTPQuery(isPost: false, uri: "/?tenant_name=\(tenant)", body: []))
        let (record, known) = try await found(pool, volume)
        var entry = known
        entry.metaVersion &+= 1
        try await keep(entry, pool, volume)
        try await require(order("set_meta_ver", pool, volume, size: record.size, entry), of: entry.stores)
    }
}
