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
        try await blocking.run { () throws(BackendError) in try store.save(saved) }
    }

    func forget(_ volume: Volume) async {
        let parts = volume.name.split(separator: "/").map(String.init)
        await forget(pool: parts[0], volume: parts[1], volume.logger)
    }

    private func forget(pool: String, volume: String, _ logger: Logger) async {
        guard let store else { return }
        do throws(BackendError) {
            try await blocking.run { () throws(BackendError) in try store.remove(pool: pool, volume: volume) }
        } catch { logger.error("the mapping stays in the state folder: \(error.message)") }
    }

    func unreserve(_ deviceID: UInt32) { state.withLock { _ = $0.reserved.remove(deviceID) } }

    /// Takes over the mappings an earlier daemon left. What cannot be taken over is logged and left as it is.
    /// - Parameter resolve: the pool of a name in a configuration.
    package func restore(
        _ resolve: @Sendable (_ pool: String, _ config: String) async throws(BackendError) -> any VolumePool
    ) async {
        guard let store else { return }
        do throws(BackendError) {
            let (documents, damaged) = try await blocking.run { () throws(BackendError) in try store.load() }
            for text in damaged { logger.error("\(text)") }
            state.withLock { $0.reserved.formUnion(documents.map(\.deviceID)) }
            for document in documents {
                do throws(BackendError) { try await restore(document, resolve) } catch {
                    logger.error(
                        "not taken over: \(error.message)", metadata: ["volume": "\(document.name)"])
                }
                unreserve(document.deviceID)
            }
            if damaged.isEmpty { await disconnectOrphans(store, documents) }
        } catch { logger.error("mappings are not taken over: \(error.message)") }
    }

    private func restore(
        _ document: MappingDocument,
        _ resolve: @Sendable (_ pool: String, _ config: String) async throws(BackendError) -> any VolumePool
    ) async throws(BackendError) {
        var attached: AttachedDevice?
        var target = MapTarget.export
        if let device = document.device {
            guard let identifier = DeviceIdentifier(device.identifier), identifier.volume == document.name else {
                throw BackendError(
                    code: EINVAL,
                    message: "its document speaks of the device '\(device.identifier)', which is not its own")
            }
            guard let kernel = await blocking.run({ KernelDevice.find(identifier) }) else {
                logger.notice("its device is gone; forgotten", metadata: ["volume": "\(document.name)"])
                await blocking.run { DeviceNames().remove(identifier) }
                await forget(pool: document.pool, volume: document.volume, logger)
                return
            }
            attached = AttachedDevice(identifier: identifier, device: kernel)
            target = .device(wanted: device.wanted)
        }
        let options = MapOptions(target: target, readOnly: document.readOnly, configPath: document.config)
        let pool = try await resolve(document.pool, document.config)
        let volume = try await serveAgain(pool, document, options)
        do throws(BackendError) {
            let record = volume.opened.record
            guard record.id == document.volumeID else {
                throw BackendError(
                    code: ESTALE,
                    message: "its volume now is another one of the same name (id 0x\(String(record.id, radix: 16))"
                        + " instead of 0x\(String(document.volumeID, radix: 16)))")
            }
            if let attached {
                let size = attached.device.size
                // Smaller when a daemon ended while the volume grew; it gets the rest with its connections.
                guard size > 0, size <= record.size else {
                    throw BackendError(
                        code: ESTALE, message: "\(attached.device.path) has \(size) bytes, the volume \(record.size)")
                }
                try await reconnect(attached, volume, VolumeSettings(document))
            }
        } catch {
            await end(volume, failingHeld: false)
            throw error
        }
        _ = await add(
            Mapping(
                deviceID: document.deviceID, pool: pool, options: options, volume: volume, device: attached,
                settings: VolumeSettings(document)))
    }

    /// The daemon before may still be ending, with I/O under way that holds the volume's lock.
    private func serveAgain(
        _ pool: any VolumePool, _ document: MappingDocument, _ options: MapOptions
    ) async throws(BackendError) -> Volume {
        let bringUp = BringUp(.takeover, now: monotonicNanoseconds())
        return try await serve(
            pool, document.volume, options, VolumeSettings(document), bringUp, document.name
        ) { [weak self] event in self?.handle(event, document.pool, document.volume) }
    }

    /// Devices this state folder made and knows nothing of any more.
    private func disconnectOrphans(_ store: MappingStore, _ documents: [MappingDocument]) async {
        let known = Set(documents.compactMap { $0.device?.identifier })
        await blocking.run { [logger] in
            for (device, identifier) in KernelDevice.ours()
            where store.made(identifier) && !known.contains(identifier.description) {
                logger.warning(
                    "\(device.path) belongs to no mapping; disconnected", metadata: ["volume": "\(identifier.volume)"])
                do throws(KernelDeviceError) {
                    try KernelDevices().disconnect(index: device.index, identifier: identifier.description)
                } catch { logger.error("\(error.message)") }
                for remark in DeviceNames().remove(device, identifier) { logger.warning("\(remark)") }
            }
        }
    }

    /// Ends a mapping that is written down and was not taken over: its volume is gone, or is another one now. What waits
    /// for the volume in the kernel fails.
    func unmapLeftover(pool: String, volume: String, force: Bool) async throws(BackendError) -> String? {
        let name = "\(pool)/\(volume)"
        guard let store,
            let document = try await blocking.run({ () throws(BackendError) in try store.load().documents })
                .first(where: { $0.pool == pool && $0.volume == volume })
        else { throw notMapped(name) }
        var logger = logger
        logger[metadataKey: "volume"] = "\(name)"
        var warning: String?
        if let text = document.device?.identifier {
            guard let identifier = DeviceIdentifier(text), identifier.volume == name else {
                throw BackendError(
                    code: ENOTTY, message: "\(name) is not mapped; its document in the state folder speaks of \(text)")
            }
            if let device = await blocking.run({ KernelDevice.find(identifier) }) {
                let attached = AttachedDevice(identifier: identifier, device: device)
                warning = try await detachDevice(attached, nil, logger, force: force)
            } else {
                await blocking.run { DeviceNames().remove(identifier) }
            }
        }
        await forget(pool: pool, volume: volume, logger)
        logger.info("unmapped; it had not been taken over")
        return warning
    }

    /// Gives a device fresh connections: what was read from the old ones is answered there, the rest the kernel sends
    /// again on the new ones.
    package func remap(pool: String, volume: String) async throws(BackendError) {
        let name = "\(pool)/\(volume)"
        try await names.run(name) { [self] () throws(BackendError) in
            guard let mapping = mapping(name) else { throw notMapped(name) }
            guard let device = mapping.device else { return }
            await mapping.volume.detachKernel(grace: Self.grace)
            try await reconnect(device, mapping.volume, mapping.settings)
            mapping.volume.logger.info("remapped: the device has fresh connections")
        }
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
