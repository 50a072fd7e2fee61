import Backend
import CLinux
import EventLoop
import Glibc
import Logging

/// A volume of a PureFlash cluster, on a loop: each shard on the store that serves it, one connection to each store, or a
/// few.
///
/// What goes wrong with a connection, a store or the layout makes requests wait. A lost store with the only replica of a
/// shard is tried again. For everything else the conductor is asked to open the volume again, once for all requests that
/// wait, and they are sent again to where its answer says. It is not asked while it may believe such a store alive
/// (`StoreWatch`). Requests are tried again until they succeed, or until `ioTimeout`, when they fail with EIO.
final class PureFlashVolume: Backend, TurnObserver, @unchecked Sendable {
    /// Nanoseconds between two looks at the oldest request.
    private static let watch: UInt64 = 250_000_000
    /// Nanoseconds that the conductor has before the stores are tried without its answer.
    private static let patience: UInt64 = 200_000_000
    /// What 1024 clients, the most there may be, have in hand.
    private static let capacity = 131_072

    private(set) var geometry: Geometry
    private var log: TroubleLog
    let opened: PureFlashOpenVolume
    let loop: EventLoop
    private let buffers: BufferPool
    private unowned(unsafe) let client: any BackendClient
    let settings: PureFlashSettings
    private let zeros: Buffer

    private(set) var layout: VolumeLayout
    /// Counts the conductor's answers.
    private var view: UInt32 = 0
    /// Those of one store side by side.
    private(set) var connections: [StoreConnection] = []
    /// By shard: the index of its store's first in `connections`, or -1 where no store is known.
    private(set) var routes: [Int]
    /// Which of a store's connections takes the next request.
    private var lane = 0
    /// By shard: which of its addresses is used.
    private var choices: [Int]

    private var requests: Slab<StoreRequest>
    var waiting: Int { requests.inUse }
    private(set) var oldest: UnsafeMutablePointer<StoreRequest>?
    private var newest: UnsafeMutablePointer<StoreRequest>?
    /// Wait for a layout.
    private var stranded = StoreQueue()
    private var sequence = UInt32.random(in: 0..<1 << 24) << 8
    private var isReopening = false
    /// What is known does not do: the conductor has to be asked.
    private var needsLayout = false
    /// By address: the loop's time since which a store could not be connected to.
    private var lostSince: [String: UInt64] = [:]
    private var closed = false
    /// Tries in a row without an answered request.
    private var troubles = 0
    /// Why requests wait.
    private(set) var trouble: String?
    /// The log says that I/O waits.
    private var isAnnounced = false
    private var lastReopen: UInt64 = 0
    private var pause: LoopTimer?
    private var watchdog: LoopTimer?

    init(_ opened: PureFlashOpenVolume, loop: EventLoop, buffers: BufferPool, client: any BackendClient)
        throws(BackendError)
    {
        self.opened = opened
        self.loop = loop
        self.buffers = buffers
        self.client = client
        layout = opened.layout
        settings = opened.settings
        log = TroubleLog(opened.logger)
        var geometry = Geometry(size: layout.size, blockSize: StoreProtocol.sector)
        geometry.maximumTransfer = StoreProtocol.maximumTransfer
        geometry.boundary = StoreProtocol.objectSize
        geometry.canTrim = false
        geometry.canZeroFast = false
        geometry.hasExtents = false
        geometry.readOnly = opened.readOnly
        self.geometry = geometry
        do { requests = try Slab(of: Self.capacity) } catch { throw BackendError(error) }
        guard let zeros = buffers.allocate(Int(StoreProtocol.maximumTransfer)) else {
            throw BackendError(code: ENOMEM, message: "no memory for buffers")
        }
        memset(zeros.base, 0, Int(StoreProtocol.maximumTransfer))
        self.zeros = zeros
        routes = Array(repeating: -1, count: layout.shards.count)
        choices = Array(repeating: 0, count: layout.shards.count)
        pause = LoopTimer(loop: loop) { [unowned self] in pauseEnded() }
        watchdog = LoopTimer(loop: loop) { [unowned self] in watch() }
        loop.observe(self)
    }

    func close() {
        closed = true
        pause?.cancel()
        watchdog?.cancel()
        pause = nil
        watchdog = nil
        for connection in connections { connection.close() }
        for name in Set(connections.map(\.name)) { StoreGuests.shared.note(self, at: name, connections: 0) }
        buffers.free(zeros)
        loop.unobserve(self)
    }

    func resized(to size: UInt64) {
        geometry.size = size
        adopt(opened.layout)
    }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }

    // MARK: Submission

    func submit(_ io: UnsafeMutablePointer<IO>) {
        switch io.pointee.operation {
        case .read:
            guard let buffer = buffers.allocate(Int(io.pointee.length)) else { return finish(io, ENOMEM) }
            io.pointee.buffer = buffer
            io.pointee.ownsBuffer = true
            io.pointee.segment.base = buffer.base
            io.pointee.segment.count = Int(io.pointee.length)
            start(io, isWrite: false, buffer.base, io.pointee.length)
        case .write: start(io, isWrite: true, io.pointee.segment.base, io.pointee.length)
        case .writeZeroes:
            if io.pointee.fast { return finish(io, EOPNOTSUPP) }
            start(io, isWrite: true, zeros.base, min(io.pointee.length, StoreProtocol.maximumTransfer))
        // A store has no flush: what it has answered is as durable as it gets, and a flush comes after that answer.
        case .flush: finish(io, 0)
        // Advice.
        case .trim, .cache: finish(io, 0)
        case .extents: describe(io)
        }
    }

    /// A store says nothing of holes: all is data.
    private func describe(_ io: UnsafeMutablePointer<IO>) {
        guard let buffer = buffers.allocate(BufferPool.blockSize) else { return finish(io, ENOMEM) }
        io.pointee.buffer = buffer
        io.pointee.ownsBuffer = true
        io.pointee.segment.base = buffer.base
        io.pointee.segment.count = MemoryLayout<Extent>.stride
        buffer.base.bindMemory(to: Extent.self, capacity: 1).initialize(
            to: Extent(length: io.pointee.length, flags: 0))
        finish(io, 0)
    }

    @inline(__always)
    private func start(
        _ io: UnsafeMutablePointer<IO>, isWrite: Bool, _ payload: UnsafeMutableRawPointer, _ length: UInt32
    ) {
        guard let request = requests.take() else { return finish(io, EAGAIN) }
        request.initialize(
            to: StoreRequest(
                io: io, payload: payload, offset: io.pointee.offset, length: length, sequence: nextSequence(),
                shard: Int32(truncatingIfNeeded: io.pointee.offset / StoreProtocol.shardSize), isWrite: isWrite,
                deadline: loop.now &+ settings.ioTimeout))
        append(request)
        dispatch(request)
    }

    /// A store takes it as it comes. Replies have no mark by which they are known: should a store lose its place in what
    /// it sends, zeros or another's data must not pass for an answer, so 0 and those in use are no sequence to begin with.
    @inline(__always)
    private func nextSequence() -> UInt32 {
        sequence &+= 256
        if sequence == 0 { sequence = 256 }
        return sequence
    }

    /// To the connection of its shard, or to those that wait for the conductor. While that is asked, stores that are
    /// well go on.
    private func dispatch(_ request: UnsafeMutablePointer<StoreRequest>) {
        guard let connection = connection(of: Int(request.pointee.shard)) else {
            stranded.append(request)
            needsLayout = true
            if !isReopening { scheduleRetry() }
            return
        }
        connection.enqueue(request)
    }

    private func connection(of shard: Int) -> StoreConnection? {
        if routes[shard] < 0 { routes[shard] = route(shard) }
        let first = routes[shard]
        guard first >= 0 else { return nil }
        guard settings.connectionsPerStore > 1 else { return connections[first] }
        for _ in 0..<settings.connectionsPerStore {
            lane = lane &+ 1 < settings.connectionsPerStore ? lane &+ 1 : 0
            if connections[first &+ lane].restsUntil <= loop.now { break }
        }
        return connections[first &+ lane]
    }

    /// The address that is used for a shard.
    private func address(of shard: Int) -> String? {
        let addresses = layout.shards[shard].addresses
        return addresses.isEmpty ? nil : addresses[choices[shard] % addresses.count]
    }

    /// The connections to the address that is used for a shard, made on demand; -1 when there are none.
    private func route(_ shard: Int) -> Int {
        guard let name = address(of: shard) else { return -1 }
        if let index = connections.firstIndex(where: { $0.name == name }) { return index }
        guard let address = StoreAddress(name, port: settings.port) else { return -1 }
        for _ in 0..<settings.connectionsPerStore {
            connections.append(
                StoreConnection(
                    name: name, address: address, volumeID: layout.id, settings: settings, loop: loop,
                    buffers: buffers, owner: self))
        }
        return connections.count - settings.connectionsPerStore
    }

    /// What goes on the wire for a request, this time.
    @inline(__always)
    func encode(_ request: UnsafeMutablePointer<StoreRequest>, id: UInt16) {
        request.pointee.view = view
        StoreCommand(
            request.pointee.isWrite ? .write : .read, id: id, volumeID: layout.id, metaVersion: layout.metaVersion,
            offset: request.pointee.offset, length: request.pointee.length, sequence: request.pointee.sequence,
            snapshot: layout.snapshot
        ).encode(to: UnsafeMutableRawPointer(request))
    }

    func endOfTurn() {
        var index = 0
        while index < connections.count {
            connections[index].flush()
            // While a pause lasts nobody is bothered.
            if pause?.isArmed == false { connections[index].connectIfNeeded() }
            index &+= 1
        }
    }

    // MARK: Completion

    func answered(_ request: UnsafeMutablePointer<StoreRequest>, _ reply: StoreReply, by connection: StoreConnection) {
        let status = reply.status
        guard status != .success else {
            recovered()
            return complete(request, 0)
        }
        // Of the volume itself it passes; where the store wants it opened again, that comes first.
        if status.code == .readOnly, !status.asksToReopen, layout.snapshot == StoreProtocol.head,
            request.pointee.isWrite
        {
            return retry(request, status, connection)
        }
        // A read brings data with plain success alone.
        if status.mayPass || status.code == .success && !request.pointee.isWrite {
            return ask(again: request, status, connection)
        }
        if status.code == .success {
            recovered()
            if log.tell(.warning, "the store \(connection.name) answered \(status)", at: loop.now) { reopen() }
        }
        complete(request, errorNumber(status, request))
    }

    /// Time will help. A store takes no writes to a volume while it copies what a snapshot needs.
    private func retry(
        _ request: UnsafeMutablePointer<StoreRequest>, _ status: StoreStatus, _ connection: StoreConnection
    ) {
        request.pointee.sequence &+= 1
        stranded.append(request)
        report("the store \(connection.name) takes no writes now (\(status))")
        if !isReopening { scheduleRetry() }
    }

    /// Time or another store will help, or opening the volume again, which may name one.
    private func ask(
        again request: UnsafeMutablePointer<StoreRequest>, _ status: StoreStatus, _ connection: StoreConnection
    ) {
        request.pointee.sequence &+= 1
        if request.pointee.view != view {
            // That was done since it was sent.
            return dispatch(request)
        }
        let shard = Int(request.pointee.shard)
        if status.code == .notPrimary, serves(connection, shard) {
            // The conductor may name the same stores: then the primary is another one of them.
            routes[shard] = -1
            choices[shard] &+= 1
        }
        stranded.append(request)
        needsLayout = true
        report("the store \(connection.name) answered \(status)")
        guard !isReopening, pause?.isArmed == false else { return }
        // At once, but not as often as a store may ask for it.
        if troubles == 0, loop.now &- lastReopen > settings.retryPause { reopen() } else { scheduleRetry() }
    }

    private func errorNumber(_ status: StoreStatus, _ request: UnsafeMutablePointer<StoreRequest>) -> Int32 {
        guard status.code != .success else { return 0 }
        log.tellFailure(request, "a store answered \(status)", at: loop.now)
        return status.code == .noSpace ? ENOSPC : status.code == .readOnly ? EROFS : EIO
    }

    private func complete(_ request: UnsafeMutablePointer<StoreRequest>, _ code: Int32) {
        let io = request.pointee.io
        remove(request)
        let length = request.pointee.length
        requests.give(request)
        if io.pointee.operation == .writeZeroes, code == 0, length < io.pointee.length {
            // The next piece of zeros goes on behind it.
            io.pointee.offset &+= UInt64(length)
            io.pointee.length &-= length
            return start(io, isWrite: true, zeros.base, min(io.pointee.length, StoreProtocol.maximumTransfer))
        }
        finish(io, code)
    }

    @inline(__always)
    private func finish(_ io: UnsafeMutablePointer<IO>, _ code: Int32) {
        io.pointee.status = code
        client.completed(io)
    }

    // MARK: Trouble

    func connected(_ connection: StoreConnection) {
        lostSince[connection.name] = nil
        noteConnections(to: connection.name)
        // What fails from here on fails for another reason.
        if !connections.contains(where: { $0.failures > 0 && !$0.isIdle && $0 !== connection }) { trouble = nil }
        log.tell(.info, "connected to the store \(connection.name)", at: loop.now)
    }

    /// Its connection is closed: nothing of it is under way.
    func orphaned(_ request: UnsafeMutablePointer<StoreRequest>) { stranded.append(request) }

    func connectionFailed(_ connection: StoreConnection, _ reason: String) {
        guard !closed else { return }
        noteConnections(to: connection.name)
        var text = "store \(connection.name): \(reason)"
        if connection.wasTurnedAway {
            // The store is well, and is not left. Mostly nothing was begun there; but it may as well have ended later, of
            // something else.
            if connection.lostWrites { failOthers(connection) }
            if connections.contains(where: { $0.name == connection.name && $0.state == .ready }) {
                log.tell(.info, text, at: loop.now)
                return sendStranded()
            }
            needsLayout = true
            if connection.hasNoRoom, let giver = StoreGuests.shared.makeRoom(at: connection.name, for: self) {
                text += "; \(giver) gives one of its own back"
            }
        } else {
            lose(connection)
            if connection.lostRequests { failOthers(connection) }
        }
        guard !stranded.isEmpty else {
            log.tell(.info, text, at: loop.now)
            return
        }
        report(text)
        scheduleRetry()
    }

    /// A store could not be reached, or does not serve the volume.
    private func lose(_ connection: StoreConnection) {
        let since = lostSince[connection.name] ?? loop.now
        lostSince[connection.name] = since
        var canBeReplaced = false
        // The next address of each shard that was served there, unless the conductor has something newer.
        for shard in routes.indices where serves(connection, shard) {
            routes[shard] = -1
            if connection.losses > 1 { choices[shard] &+= 1 }
            if layout.shards[shard].addresses.count > 1 { canBeReplaced = true }
        }
        // It runs again, and has to be told of the volume first.
        if connection.wasRefused, !needsLayout { troubles = 0 }
        if connection.wasRefused || canBeReplaced || loop.now &- since >= settings.grace { needsLayout = true }
    }

    private func noteConnections(to name: String) {
        let ready = connections.count { $0.name == name && $0.state == .ready }
        StoreGuests.shared.note(self, at: name, connections: ready)
    }

    /// One of several connections to a store is needed more elsewhere.
    func giveBack(at name: String, for needy: String) {
        let ready = connections.filter { $0.name == name && $0.state == .ready && !$0.isRetiring }
        guard !closed, ready.count > 1, let last = ready.last else { return }
        log.logger.notice("a connection to the store \(name) is given back: it has no room for one of \(needy)")
        last.retire()
    }

    /// It has ended by itself.
    func retired(_ connection: StoreConnection) { noteConnections(to: connection.name) }

    private func serves(_ connection: StoreConnection, _ shard: Int) -> Bool {
        routes[shard] >= 0 && connections[routes[shard]].name == connection.name
    }

    /// The store may still execute what was sent on a connection that is lost. Nothing newer may reach it before it has
    /// answered another handshake, so the other connections to it end as well.
    private func failOthers(_ connection: StoreConnection) {
        guard settings.connectionsPerStore > 1 else { return }
        for other in connections where other !== connection && other.name == connection.name && other.state != .closed {
            other.fail("another connection to this store was lost", isItsOwn: false)
        }
    }

    /// Says what is wrong once, not for every request and try.
    private func report(_ reason: String) {
        trouble = reason
        if log.tell(.warning, "I/O waits: \(reason)", at: loop.now) { isAnnounced = true }
    }

    @inline(__always)
    private func recovered() {
        if troubles > 0 || trouble != nil { endTrouble() }
    }

    /// Unless it was another store that answered.
    private func endTrouble() {
        guard stranded.isEmpty, !connections.contains(where: { $0.failures > 0 && !$0.isIdle }) else { return }
        troubles = 0
        trouble = nil
        if isAnnounced { log.logger.info("I/O goes on") }
        isAnnounced = false
    }

    private func scheduleRetry() {
        guard pause?.isArmed == false else { return }
        let longest = settings.retryPause << UInt64(min(troubles, needsLayout ? 3 : 2))
        troubles += 1
        // Many hosts lose the same store at the same time.
        pause?.arm(after: longest / 2 + UInt64.random(in: 0...longest / 2))
    }

    private func pauseEnded() {
        // The conductor takes its time, or is not needed: the stores may do without it.
        if isReopening || !needsLayout { sendStranded() } else { reopen() }
    }

    /// Asks the conductor once for all who wait.
    private func reopen() {
        guard !isReopening, !closed else { return }
        isReopening = true
        lastReopen = loop.now
        pause?.arm(after: Self.patience)
        opened.reopen(sparing: layout.irreplaceable, since: lostSince) { [weak self] result in
            guard let self else { return }
            // When the loop has ended, nobody waits any more.
            loop.post { self.reopened(result) }
        }
    }

    private func reopened(_ result: Result<VolumeLayout, BackendError>) {
        guard !closed else { return }
        isReopening = false
        pause?.cancel()
        switch result {
        case .success(let new):
            guard new.id == layout.id, new.snapshot == layout.snapshot, new.shards.count >= layout.shards.count,
                new.size >= geometry.size
            else {
                report("the conductor now has another volume under this name; unmap it")
                return scheduleRetry()
            }
            needsLayout = false
            view &+= 1
            adopt(new)
        case .failure(let error):
            // The stores may do without it.
            report(error.message)
            guard layout.shards.contains(where: { !$0.addresses.isEmpty }) else { return scheduleRetry() }
        }
        sendStranded()
    }

    private func sendStranded() {
        var waiting = stranded
        stranded = StoreQueue()
        while let request = waiting.removeFirst() { dispatch(request) }
        loop.runAgain()
    }

    private func adopt(_ new: VolumeLayout) {
        let old = layout.shards
        layout = new
        guard new.shards != old else { return }
        routes = Array(repeating: -1, count: new.shards.count)
        choices += Array(repeating: 0, count: max(new.shards.count - choices.count, 0))
        for shard in old.indices where new.shards[shard] != old[shard] { choices[shard] = 0 }
        // What waited for a store that does not serve it any more goes where it is served now. What is in flight there
        // may never be answered: it does the same, and nothing is left of the connections to that store.
        var left: Set<String> = []
        for connection in connections {
            take(connection.takeWaiting())
            if connection.hasInFlight(where: { address(of: Int($0.shard)) != connection.name }) {
                left.insert(connection.name)
            }
        }
        let named = Set(new.shards.flatMap(\.addresses))
        for connection in connections where left.contains(connection.name) || !named.contains(connection.name) {
            take(connection.withdraw())
        }
        connections.removeAll { !named.contains($0.name) }
        sendStranded()
        log.tell(
            .info, "the shards are served by \(Set(new.shards.compactMap(\.addresses.first)).sorted())", at: loop.now)
    }

    private func take(_ requests: StoreQueue) {
        var requests = requests
        while let request = requests.removeFirst() { stranded.append(request) }
    }

    // MARK: Time

    private func append(_ request: UnsafeMutablePointer<StoreRequest>) {
        request.pointee.older = newest
        if let newest { newest.pointee.newer = request } else { oldest = request }
        newest = request
        if watchdog?.isArmed == false { watchdog?.arm(after: Self.watch) }
    }

    @inline(__always)
    private func remove(_ request: UnsafeMutablePointer<StoreRequest>) {
        let older = request.pointee.older
        let newer = request.pointee.newer
        if let older { older.pointee.newer = newer } else { oldest = newer }
        if let newer { newer.pointee.older = older } else { newest = older }
    }

    private func watch() {
        failExpired()
        doubtSilent()
        if oldest != nil { watchdog?.arm(after: Self.watch) }
        loop.runAgain()
    }

    private func failExpired() {
        while let request = oldest, request.pointee.deadline <= loop.now {
            var expired = stranded.removeExpired(at: loop.now)
            for connection in connections { connection.takeExpired(at: loop.now, into: &expired) }
            if expired.isEmpty {
                // It is under way. That ends its connection, and the others of that wait here then.
                for connection in connections where connection.forget(request) { break }
                expired.append(request)
            }
            while let request = expired.removeFirst() {
                log.tellFailure(
                    request,
                    "not done after \(settings.ioTimeout / 1_000_000_000) s: \(trouble ?? "the store does not answer")",
                    at: loop.now)
                complete(request, EIO)
            }
        }
    }

    /// An answer that is late may never come. At first the conductor is asked, which may know of another store; later the
    /// connection is closed, and its requests are sent again, the late one to the next address of its shard.
    private func doubtSilent() {
        let doubt = min(settings.connectTimeout, settings.ioTimeout / 4)
        let arrival = loop.now &+ settings.ioTimeout &- doubt
        guard let oldest, oldest.pointee.deadline <= arrival else { return }
        var asks = false
        for connection in connections {
            guard let request = connection.longestInFlight() else { continue }
            let age = loop.now &- request.pointee.sent
            asks = asks || age >= doubt
            guard age >= settings.ioTimeout / 2 else { continue }
            let shard = Int(request.pointee.shard)
            let choice = choices[shard]
            let isServed = serves(connection, shard)
            connection.fail("no answer to a request within \(settings.ioTimeout / 2_000_000) ms")
            if isServed, choices[shard] == choice { choices[shard] &+= 1 }
        }
        if asks, pause?.isArmed == false, loop.now &- lastReopen >= doubt { reopen() }
    }
}
