import Backend
import Configuration
import Control
import Glibc
import Logging
import Volumes

/// Answers commands with the volumes of this host.
struct DaemonService: ControlService {
    let manager: VolumeManager
    let pools: PoolDirectory
    let logger: Logger
    /// Reads of configurations are on behalf of this one.
    var caller: ControlCaller

    func asked(by caller: ControlCaller) -> DaemonService {
        var service = self
        service.caller = caller
        return service
    }

    func map(_ request: MapRequest) async throws(ControlError) -> MapRequest.Answer {
        let name = try VolumeName.reachable(request.volume, snapshot: .allowed)
        let config = try ConfigPath.validate(request.config)
        let configuration = try await pools.configuration(config, for: caller)
        let pool = try await pools.pool(name.pool, of: configuration, config, transport: name.transport)
        var limits = ThrottleLimits.none
        request.limits.apply(to: &limits)
        do throws(BackendError) {
            return MappingRecord(
                try await manager.map(
                    pool, volume: name.inPool,
                    options: MapOptions(
                        target: request.export ? .export : .device(wanted: request.device),
                        readOnly: request.readOnly || name.snapshot != nil, configPath: config, limits: limits,
                        deviceID: request.deviceID, timing: VolumeTiming(configuration.client))))
        } catch {
            throw failed("map", name, error)
        }
    }

    func unmap(_ request: UnmapRequest) async throws(ControlError) -> UnmapRequest.Answer {
        let name = try VolumeName.reachable(request.volume, snapshot: .allowed)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            return .init(
                warning: try await manager.unmap(pool: name.pool, volume: name.inPool, force: request.force))
        } catch {
            throw failed("unmap", name, error)
        }
    }

    func remap(_ request: RemapRequest) async throws(ControlError) -> RemapRequest.Answer {
        let name = try VolumeName.reachable(request.volume, snapshot: .allowed)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            try await manager.remap(pool: name.pool, volume: name.inPool)
        } catch {
            throw failed("remap", name, error)
        }
        return Done()
    }

    func resize(_ request: ResizeRequest) async throws(ControlError) -> ResizeRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            if let record = try await manager.resize(
                pool: name.pool, volume: name.volume, to: request.size, rescan: request.rescanPartitions)
            {
                return PoolVolume(record, inPool: name.pool)
            }
        } catch {
            throw failed("resize", name, error)
        }
        guard let config = request.config ?? request.defaultConfig else {
            throw .notMapped("\(name) is not mapped; name the configuration of its pool to grow it all the same")
        }
        let pool = try await pools.pool(
            name.pool, try ConfigPath.validate(config), transport: name.transport, for: caller)
        do throws(BackendError) {
            return PoolVolume(
                try await manager.resize(pool, volume: name.volume, to: request.size), inPool: name.pool)
        } catch {
            throw failed("resize", name, error)
        }
    }

    func setThrottle(_ request: SetThrottleRequest) async throws(ControlError) -> SetThrottleRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            let limits = try await manager.setLimits(pool: name.pool, volume: name.volume) {
                [limits = request.limits] in
                limits.apply(to: &$0)
            }
            return Limits(limits)
        } catch {
            throw failed("throttle", name, error)
        }
    }

    func suspend(_ request: SuspendRequest) async throws(ControlError) -> SuspendRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            try await manager.suspend(
                pool: name.pool, volume: name.volume, timeout: request.timeout ?? SuspendRequest.defaultTimeout)
        } catch {
            throw failed("suspend", name, error)
        }
        return Done()
    }

    func resume(_ request: ResumeRequest) async throws(ControlError) -> ResumeRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            return .init(
                warning: try await manager.resume(pool: name.pool, volume: name.volume, GateState(request.mode)))
        } catch {
            throw failed("resume", name, error)
        }
    }

    func list(_ request: ListRequest) async throws(ControlError) -> ListRequest.Answer {
        .init(mappings: await manager.list().map { MappingRecord($0) })
    }

    func info(_ request: InfoRequest) async throws(ControlError) -> InfoRequest.Answer {
        let name = try VolumeName.reachable(request.volume, snapshot: .allowed)
        try checkConfig(request.config, of: name)
        do throws(BackendError) {
            return MappingStatus(try await manager.info(pool: name.pool, volume: name.inPool))
        } catch {
            throw ControlError(error)
        }
    }

    func version(_ request: VersionRequest) async throws(ControlError) -> VersionRequest.Answer {
        .init(version: ProductVersion.string, pid: getpid())
    }

    /// A configuration that was named must be the one the volume was mapped with: another cluster may have a volume of
    /// the same name.
    func checkConfig(_ config: String?, of name: VolumeName) throws(ControlError) {
        guard let config else { return }
        _ = try ConfigPath.validate(config)
        guard let mapped = manager.configPath(pool: name.pool, volume: name.inPool), mapped != config else { return }
        throw .notMapped("\(name) is not mapped with \(config) but with \(mapped); leave -c out, or name that one")
    }

    func failed(_ what: String, _ name: VolumeName, _ error: BackendError) -> ControlError {
        logger.notice(
            "cannot \(what): \(error.message)", metadata: ["volume": "\(name)", "errno": "\(error.code)"])
        return ControlError(error)
    }
}

// MARK: - Volumes of a pool

extension DaemonService {
    func create(_ request: CreateRequest) async throws(ControlError) -> CreateRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        let pool = try await pools.pool(
            name.pool, try ConfigPath.validate(request.config), transport: name.transport, for: caller)
        do throws(BackendError) {
            let record = try await manager.create(
                pool, volume: name.volume, size: request.size, blockSize: request.blockSize, replicas: request.replicas)
            return PoolVolume(record, inPool: name.pool)
        } catch {
            throw failed("create", name, error)
        }
    }

    func delete(_ request: DeleteRequest) async throws(ControlError) -> DeleteRequest.Answer {
        let name = try VolumeName.reachable(request.volume)
        let pool = try await pools.pool(
            name.pool, try ConfigPath.validate(request.config), transport: name.transport, for: caller)
        do throws(BackendError) {
            try await manager.delete(
                pool, volume: name.volume, snapshots: request.snapshots, force: request.force)
        } catch {
            throw failed("delete", name, error)
        }
        return Done()
    }

    func volumes(_ request: VolumesRequest) async throws(ControlError) -> VolumesRequest.Answer {
        let config = try ConfigPath.validate(request.config)
        let configuration = try await pools.configuration(config, for: caller)
        if let pool = request.pool {
            var answer = VolumesRequest.Answer(volumes: [], problems: [])
            try await add(pool, configuration, config, to: &answer)
            return answer
        }
        var answer = VolumesRequest.Answer(volumes: [], problems: [])
        var names = Set(configuration.pools.keys)
        if let conductor = await pools.conductor(of: configuration) {
            do throws(BackendError) { names.formUnion(try await conductor.tenants()) } catch {
                let error = ControlError(error)
                answer.problems.append(
                    PoolProblem(
                        pool: "-",
                        error: ControlError(
                            error.code, "the tenants of the cluster cannot be listed: \(error.message)")))
            }
        }
        for pool in names.sorted() {
            do throws(ControlError) {
                try await add(pool, configuration, config, to: &answer)
            } catch {
                answer.problems.append(PoolProblem(pool: pool, error: error))
            }
        }
        return answer
    }

    private func add(
        _ name: String, _ configuration: DaemonConfiguration, _ path: String, to answer: inout VolumesRequest.Answer
    ) async throws(ControlError) {
        let pool = try await pools.pool(name, of: configuration, path)
        do throws(BackendError) {
            let contents = try await manager.contents(pool)
            answer.volumes += contents.volumes.map { PoolVolume($0, inPool: pool.name) }
            answer.damaged += contents.damaged.map {
                DamagedPoolVolume(volume: "\(pool.name)/\($0.volume)", reason: $0.reason)
            }
            if let space = contents.space { answer.spaces.append(PoolRoom(space, of: pool.name)) }
        } catch {
            throw ControlError(error)
        }
    }
}
