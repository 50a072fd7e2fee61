import Backend
import EventLoop
import Glibc
import Logging
import NBD
import Synchronization

// What survives the daemon: each mapping is written down, and taken over by the next daemon.
extension VolumeManager {
    func remember(
        _ pool: any VolumePool, _ options: MapOptions, _ settings: VolumeSettings, _ volume: Volume, _ deviceID: UInt32,
        _ identifier: DeviceIdentifier?
    ) async throws(BackendError) {
        guard let store else { return }
        var document = MappingDocument(
            pool: pool.name, volume: volume.opened.record.volume, volumeID: volume.opened.record.id,
            config: options.configPath, readOnly: options.readOnly, deviceID: deviceID)
        if case .device(let wanted) = options.target, let identifier {
            document.device = .init(identifier: identifier.description, wanted: wanted)
        }
        if settings.gate != .normal { document.gate = .init(state: settings.gate, since: settings.gateSince) }
        if settings.limits != .none { document.limits = settings.limits }
        let saved = document
        try await blocking.run { () throws(BackendError) in
            var document = saved
            // It may have come to be while this waited for the thread.
            document.flushesFailSince = volume.flushesFailSince
            try store.save(document)
        }
    }

    /// Not one after the other with the volume's commands: those may wait for the flush that waits for this.
    func write(flushesFailSince since: Int64, _ pool: String, _ volume: String) async {
        guard let store else { return }
        do throws(BackendError) {
            try await blocking.run { () throws(BackendError) in
                try store.change(pool: pool, volume: volume) { $0.flushesFailSince = since }
            }
        } catch {
            logger.error(
                "that flushes fail is not written down, and the next daemon will not know of it: \(error.message)",
                metadata: ["volume": "\(pool)/\(volume)"])
        }
    }

    /// - Returns: what is to be known of it: the next daemon would map it again. Nil for nothing.
    @discardableResult
    func forget(_ volume: Volume) async -> String? { await forget(volume.name, volume.logger) }

    /// - Parameter name: `pool/volume`.
    @discardableResult
    func forget(_ name: String, _ logger: Logger) async -> String? {
        state.withLock { $0.leftovers[name] = nil }
        guard let store else { return nil }
        let parts = name.split(separator: "/").map(String.init)
        do throws(BackendError) {
            try await blocking.run { () throws(BackendError) in try store.remove(pool: parts[0], volume: parts[1]) }
            return nil
        } catch {
            let text =
                "\(name) stays in the state folder, and a daemon that is started again may map it (\(error.message));"
                + " map and unmap it when the folder can be written"
            logger.error("\(text)")
            return text
        }
    }

    func unreserve(_ deviceID: UInt32) { state.withLock { _ = $0.reserved.remove(deviceID) } }

    // MARK: Taking over

    /// Takes over the mappings an earlier daemon left, side by side. Returns when each was tried once, or after
    /// `patience` seconds; what has not come by then is tried again until it does or is unmapped, and known to `map`,
    /// `list` and `info` meanwhile.
    /// - Throws: when the state folder cannot be read; nothing was done then.
    package func restore(patience: UInt64 = 5, _ resolve: @escaping Resolve) async throws(BackendError) {
        guard let store else { return }
        let found = try await blocking.run { () throws(BackendError) in try Leftovers.find(store) }
        for text in found.problems { logger.error("\(text)") }
        state.withLock { $0.leftovers = found.leftovers }
        for document in found.gone { await forgetGone(document) }
        let tries = Task {
            await withTaskGroup(of: Void.self) { group in
                group.addTask { [self] in await disconnect(found.orphans) }
                for name in found.leftovers.keys {
                    group.addTask { [self] in
                        if await !tryTakeover(name, resolve) { Task { await keepTrying(name, resolve) } }
                    }
                }
            }
        }
        _ = await tries.isDone(within: patience)
    }

    private func keepTrying(_ name: String, _ resolve: @escaping Resolve) async {
        var pause: UInt64 = 1
        repeat {
            await wait(nanoseconds: pause * 1_000_000_000)
            pause = min(pause * 2, 5)
        } while await !tryTakeover(name, resolve)
    }

    /// - Returns: whether that is the end of it: it is taken over, or time will not help.
    private func tryTakeover(_ name: String, _ resolve: @escaping Resolve) async -> Bool {
        await names.run(name) { [self] in
            guard !isStopping, let leftover = leftover(name), let document = leftover.document else { return true }
            do throws(BackendError) {
                let (pool, timing) = try await resolve(document.pool, document.config)
                _ = try await takeOver(
                    leftover, document, pool, timing, BringUp(.takeover, now: monotonicNanoseconds()), name, nil)
                return true
            } catch {
                return isStopping || !note(error, name)
            }
        }
    }

    /// - Returns: nil when its device is gone, and the mapping with it.
    func takeOver(
        _ leftover: Leftover, _ document: MappingDocument, _ pool: any VolumePool, _ timing: VolumeTiming,
        _ bringUp: BringUp, _ name: String, _ pending: PendingMap?
    ) async throws(BackendError) -> MappedVolume? {
        let leftover = try await finding(leftover, name)
        if leftover.isDevice {
            guard let attached = leftover.device, try await isConnected(attached) else {
                await forgetGone(document)
                return nil
            }
        }
        let options = MapOptions(
            target: !leftover.isDevice ? .export : .device(wanted: document.device?.wanted),
            readOnly: document.readOnly, configPath: document.config, timing: timing)
        let settings = VolumeSettings(document)
        let volume = try await serve(
            pool, document.volume, options, settings, bringUp, name, pending
        ) { [weak self] event in
            self?.handle(event, document.pool, document.volume)
        }
        do throws(BackendError) {
            let record = volume.opened.record
            guard record.id == document.volumeID else {
                throw BackendError(
                    code: ESTALE,
                    message: "its volume now is another one of the same name (id 0x\(String(record.id, radix: 16))"
                        + " instead of 0x\(String(document.volumeID, radix: 16)))")
            }
            guard !isStopping else { throw BackendError(code: ESHUTDOWN, message: "qbdd is stopping") }
            if let attached = leftover.device {
                let size = try Self.looking { () throws(SystemError) in try attached.device.size }
                // Smaller when a daemon ended while the volume grew; it gets the rest with its connections.
                guard size > 0, size <= record.size else {
                    throw BackendError(
                        code: ESTALE, message: "\(attached.device.path) has \(size) bytes, the volume \(record.size)")
                }
                try await reconnect(attached, volume, settings)
            }
        } catch {
            await end(volume, failingHeld: false)
            throw error
        }
        return await add(
            Mapping(
                deviceID: document.deviceID, pool: pool, options: options, volume: volume, device: leftover.device,
                settings: settings))
    }

    private func forgetGone(_ document: MappingDocument) async {
        logger.notice("its device is gone; forgotten", metadata: ["volume": "\(document.name)"])
        if let identifier = document.device.flatMap({ DeviceIdentifier($0.identifier) }) {
            for remark in await blocking.run({ DeviceNames().remove(identifier) }) {
                logger.warning("\(remark)", metadata: ["volume": "\(document.name)"])
            }
        }
        await forget(document.name, logger)
    }

    private func disconnect(_ orphans: [AttachedDevice]) async {
        await BlockingThread.always(on: blocking) { [logger] in
            for orphan in orphans {
                let (device, identifier) = (orphan.device, orphan.identifier)
                logger.warning(
                    "\(device.path) belongs to no mapping; disconnected", metadata: ["volume": "\(identifier.volume)"])
                do throws(KernelDeviceError) {
                    try KernelDevices().disconnect(index: device.index, identifier: identifier.description)
                } catch { logger.error("\(error.message)") }
                for remark in DeviceNames().remove(device, identifier) { logger.warning("\(remark)") }
            }
        }
    }

    // MARK: Fresh connections

    /// Gives a device fresh connections: what was read from the old ones is answered there, the rest the kernel sends
    /// again on the new ones.
    package func remap(pool: String, volume: String) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            guard let device = mapping.device else { return }
            await mapping.volume.detachKernel(grace: Self.grace)
            do throws(BackendError) { try await reconnect(device, mapping.volume, mapping.settings) } catch {
                await mapping.volume.expectKernelToStay()
                throw error
            }
            mapping.volume.logger.info("remapped: the device has fresh connections")
        }
    }

    /// What failed once, as a look at /sys may, is tried a few times.
    func connectAgain(_ pool: String, _ volume: String) async {
        for triesLeft in (0..<3).reversed() {
            do throws(BackendError) { return try await replaceLostConnections(pool: pool, volume: volume) } catch {
                let again = triesLeft > 0 ? ", tried again" : ""
                logger.error("not connected again\(again): \(error.message)", metadata: ["volume": "\(pool)/\(volume)"])
            }
            if triesLeft > 0 { await wait(nanoseconds: 1_000_000_000) }
        }
        mapping("\(pool)/\(volume)")?.volume.giveUpConnecting()
    }

    /// Gives a device new connections for those that ended by themselves.
    func replaceLostConnections(pool: String, volume: String) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            // Unmapped meanwhile: the kernel said goodbye, and there is nothing to connect.
            guard let mapping = mapping(name), let device = mapping.device,
                let open = await mapping.volume.status()?.kernelConnections
            else { return }
            try await reconnect(device, mapping.volume, mapping.settings, open: open)
        }
    }
}
