import Backend
import EventLoop
import Glibc
import Logging

// A volume on its way up and down, whoever asked for it: a map or a takeover.
extension VolumeManager {
    /// Brings the volume up: opens it, as often as that promises something, looks whether it can be served, and starts
    /// its loop.
    /// - Parameter pending: the map that wants it, if that can be given up.
    func serve(
        _ pool: any VolumePool, _ volume: String, _ options: MapOptions, _ settings: VolumeSettings,
        _ bringUp: BringUp, _ name: String, _ pending: PendingMap?, report: @escaping @Sendable (SessionEvent) -> Void
    ) async throws(BackendError) -> Volume {
        let opened = try await open(pool, volume, options, bringUp, name, pending)
        var volumeLogger = logger
        volumeLogger[metadataKey: "volume"] = "\(name)"
        do throws(BackendError) {
            try BringUp.check(opened.record, isProtected: opened.readOnly, readOnly: options.readOnly, name: name)
            if settings.flushesFailSince != nil { opened.failFlushes() }
            return try await Volume.start(
                name: name, opened: opened, settings: settings, slowIO: options.timing.slowIO,
                maximumSessions: maximumConnections, logger: volumeLogger, report: report)
        } catch {
            await BlockingThread.always(on: blocking) { opened.close() }
            throw error
        }
    }

    private func open(
        _ pool: any VolumePool, _ volume: String, _ options: MapOptions, _ bringUp: BringUp, _ name: String,
        _ pending: PendingMap?
    ) async throws(BackendError) -> any OpenVolume {
        // What a takeover waits for is told when it is over.
        var isFirst = !bringUp.isTakeover
        while true {
            do throws(BackendError) {
                if let reason = pending?.reason { throw reason }
                let limit = bringUp.remaining(now: monotonicNanoseconds())
                // A cluster may take its time, and holds up nobody else.
                return try await Aside.run { [self] in
                    isStopping
                        ? BackendError(code: ESHUTDOWN, message: "\(name) is not opened: qbdd is stopping")
                        : pending?.reason
                } _: { () throws(BackendError) in
                    let opened = try pool.open(volume: volume, readOnly: options.readOnly, within: limit)
                    do throws(BackendError) { try pending?.opened() } catch {
                        opened.close()
                        throw error
                    }
                    return opened
                }
            } catch {
                let pause: UInt64
                switch bringUp.decide(error, now: monotonicNanoseconds()) {
                case .giveUp(let reason): throw reason
                case .again(let time): pause = time
                }
                guard !isStopping else { throw error }
                pending?.note(error)
                if isFirst {
                    logger.notice("not ready yet, tried again: \(error.message)", metadata: ["volume": "\(name)"])
                }
                isFirst = false
                await wait(nanoseconds: pause)
            }
        }
    }

    var isStopping: Bool { state.withLock { $0.stopping } }

    func wait(nanoseconds: UInt64) async {
        // Only cancellation ends it early, and nobody cancels this.
        do { try await Task.sleep(nanoseconds: nanoseconds) } catch {}
    }

    func end(_ volume: Volume, failingHeld: Bool) async {
        await volume.stop(grace: Self.grace, failingHeld: failingHeld)
        await BlockingThread.always(on: blocking) { volume.opened.close() }
    }
}
