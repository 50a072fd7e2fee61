import CLinux
import EventLoop
import Glibc
import NBD

/// What a volume's loop knows of its device's connections.
struct KernelSide {
    /// The peer's name of a session with the kernel.
    static let peer = "kernel"
    /// Connections of one device, old and new ones during a change among them.
    static let maximumSessions = 8

    /// Those that are open.
    var sessions: ContiguousArray<Session> = []
    /// They are meant to end.
    var isDetached = false
    /// Called when no session is open.
    var gone: [@Sendable () -> Void] = []
    var drainTimer: LoopTimer?
}

// With several connections, the kernel may have given one up and used the next before its end was seen here: what was
// received is looked at only after the others were found to be open. What becomes of requests in flight: `Volume+Leaving`.
extension Volume {
    // MARK: From the manager

    /// Serves the kernel on connected sockets, with simple replies as it wants them. From any thread.
    package func attachKernel(_ sockets: [Int32]) {
        let negotiated = Negotiated(export: export, structured: false, baseAllocation: false)
        let accepted = loop.post { [self] in
            kernel.isDetached = false
            for socket in sockets {
                begin(descriptor: socket, peer: KernelSide.peer, negotiated: negotiated, leftover: [])
            }
            notice(.connected)
        }
        if !accepted { for socket in sockets { Glibc.close(socket) } }
    }

    /// Reads no more from the kernel, answers what was read, and closes its sessions; returns when they are closed. What
    /// was not read, is held back, or is not answered within `grace` seconds stays with the kernel, which sends it again
    /// on the next connections.
    package func detachKernel(grace: UInt64) async {
        await withCheckedContinuation { continuation in
            let accepted = loop.post { [self] in
                kernel.isDetached = true
                guard !kernel.sessions.isEmpty else { return continuation.resume() }
                kernel.gone.append { continuation.resume() }
                for session in kernel.sessions {
                    session.drain()
                    dropHeld(of: session)
                }
                // Idle ones are closed already; a timer would end the next ones.
                guard !kernel.sessions.isEmpty else { return loop.runAgain() }
                let timer = LoopTimer(loop: loop) { [unowned self] in
                    closeKernel("has requests that were not answered within \(grace) s")
                }
                timer.arm(after: grace * 1_000_000_000)
                kernel.drainTimer = timer
                loop.runAgain()
            }
            if !accepted { continuation.resume() }
        }
    }

    /// Closes the kernel's sessions at once. Its requests go on without an answer; it fails them, or sends them again on
    /// other connections.
    package func severKernel() async {
        _ = await loop.call { [self] in
            kernel.isDetached = true
            closeKernel("given up")
        }
    }

    /// The end of a connection is no loss from here on: the device is being disconnected.
    package func expectKernelToLeave() async {
        _ = await loop.call { [self] in kernel.isDetached = true }
    }

    /// The device stays after all: what ended meanwhile is a loss, and so is what ends from here on.
    package func expectKernelToStay() async {
        _ = await loop.call { [self] in
            kernel.isDetached = false
            guard !stopping else { return }
            if kernel.sessions.isEmpty { notice(.connectionLost) }
            report(.kernelConnectionLost)
        }
    }

    // MARK: On the loop

    private func closeKernel(_ reason: String) {
        for session in kernel.sessions { session.abort(reason) }
    }

    package func received(_ session: Session) {
        if kernel.sessions.count > 1 { closeGivenUp() }
    }

    /// Closes the connections that the kernel has shut down. It does so before it sends what was in flight there again,
    /// so whoever has received a second copy sees here that the connection of the first is down.
    private func closeGivenUp() {
        let open = kernel.sessions
        withUnsafeTemporaryAllocation(of: pollfd.self, capacity: open.count) { ends in
            for index in 0..<open.count { ends[index] = pollfd(fd: open[index].descriptor, events: 0, revents: 0) }
            guard poll(ends.baseAddress, nfds_t(open.count), 0) > 0 else { return }
            for index in 0..<open.count where ends[index].revents != 0 { open[index].abort("given up by the kernel") }
        }
    }

    /// A connection of the kernel is closed.
    func kernelSessionClosed(_ session: Session) {
        kernel.sessions.removeAll { $0 === session }
        if !kernel.isDetached, !stopping {
            notice(kernel.sessions.isEmpty ? .connectionLost : .pathLost)
            report(.kernelConnectionLost)
        }
        guard kernel.sessions.isEmpty else { return }
        kernel.drainTimer?.cancel()
        kernel.drainTimer = nil
        for closure in kernel.gone { closure() }
        kernel.gone = []
    }
}
