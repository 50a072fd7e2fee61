import CLinux
import EventLoop
import Glibc

/// A connection between the kernel and a session.
package struct SocketPair: Sendable {
    /// Closed here when it has been handed over. The driver waits on it all the same: not to block is a property of
    /// the descriptor, which it does not go through.
    package let kernel: Int32
    /// For a session.
    package let server: Int32

    /// Bytes a direction may hold. The kernel sends a write page by page, and stops at each page that has no room:
    /// with the usual 208 KiB, large writes were half as fast.
    static let bufferSize: Int32 = 1 << 20

    package static func make(count: Int) throws(SystemError) -> [SocketPair] {
        var pairs: [SocketPair] = []
        do {
            for _ in 0..<count { pairs.append(try SocketPair()) }
        } catch {
            for pair in pairs { pair.close() }
            throw error
        }
        return pairs
    }

    private init() throws(SystemError) {
        var ends: [Int32] = [-1, -1]
        try retrying("make a socket pair") {
            socketpair(
                AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0,
                &ends)
        }
        kernel = ends[0]
        server = ends[1]
        for end in ends { SendBuffer.enlarge(end, to: Self.bufferSize) }
    }

    package func closeKernelEnd() { Glibc.close(kernel) }

    package func close() {
        Glibc.close(kernel)
        Glibc.close(server)
    }

    /// Whether the kernel has let go of its end, once that is closed here.
    var isDropped: Bool {
        var byte: UInt8 = 0
        return recv(server, &byte, 1, Int32(MSG_PEEK | MSG_DONTWAIT)) == 0
    }
}

extension KernelDevices {
    /// Makes connections and a device of them.
    ///
    /// One connection is what the driver (Linux 6.1, and the newest seen, 6.6) handles well. Of several
    /// - it ends that of a request which takes longer than the queue's `io_timeout`, whatever the request time-out is,
    ///   and sends the request again on another one while the first copy may still be under way here, where the volume
    ///   keeps the two apart;
    /// - it may receive on the first alone until that ends: their receivers are work that never returns, on a queue
    ///   whose rescue thread, which steps in when a worker cannot be made within 10 ms, takes all of it one by one.
    /// - Parameter connect: without sockets.
    /// - Returns: the X of /dev/nbdX and the sessions' ends, which are the caller's.
    package func connect(
        _ connect: KernelConnect, connections: Int, busyTimeout: Double = 5
    ) throws(KernelDeviceError) -> (index: UInt32, sockets: [Int32]) {
        let pairs = try makePairs(connections)
        var request = connect
        request.sockets = pairs.map(\.kernel)
        do throws(KernelDeviceError) {
            let index = try self.connect(request, busyTimeout: busyTimeout)
            for pair in pairs { pair.closeKernelEnd() }
            return (index, pairs.map(\.server))
        } catch {
            for pair in pairs { pair.close() }
            throw error
        }
    }

    /// Gives a device new connections for its dead ones, after a daemon's death or when the sessions were shut down.
    ///
    /// The kernel notices the end of a connection some time after it happened, and says success while it drops new
    /// ones that it has no use for; so this offers them until all were taken.
    /// - Parameters:
    ///   - connections: as many as were made at connect.
    ///   - timeout: seconds until those that were taken have to do.
    /// - Returns: the sessions' ends, at least one, which are the caller's. EBUSY when no connection was dead.
    package func reconnect(
        index: UInt32, identifier: String, connections: Int, deadConnectionTimeout: UInt64, timeout: Double = 10
    ) throws(KernelDeviceError) -> [Int32] {
        var taken: [Int32] = []
        let deadline = Deadline(seconds: timeout)
        while true {
            let pairs = try makePairs(connections - taken.count, or: taken)
            var reconfigure = KernelReconfigure(index: index, identifier: identifier)
            reconfigure.sockets = pairs.map(\.kernel)
            reconfigure.deadConnectionTimeout = deadConnectionTimeout
            do throws(KernelDeviceError) {
                try self.reconfigure(reconfigure)
            } catch {
                for pair in pairs { pair.close() }
                for socket in taken { close(socket) }
                throw error
            }
            for pair in pairs {
                pair.closeKernelEnd()
                if pair.isDropped { close(pair.server) } else { taken.append(pair.server) }
            }
            if taken.count == connections || (deadline.passed && !taken.isEmpty) { return taken }
            guard !deadline.passed else {
                throw KernelDeviceError(
                    code: EBUSY,
                    "/dev/nbd\(index) took no new connection: those it has are alive; another daemon may serve it")
            }
            pause(2_000_000)
        }
    }

    private func makePairs(_ count: Int, or taken: [Int32] = []) throws(KernelDeviceError) -> [SocketPair] {
        do throws(SystemError) {
            return try SocketPair.make(count: count)
        } catch {
            for socket in taken { close(socket) }
            throw KernelDeviceError(error)
        }
    }
}
