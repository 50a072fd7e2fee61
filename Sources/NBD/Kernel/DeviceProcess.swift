import CLinux
import EventLoop
import Glibc
import Synchronization

/// A device's work, done by a process of its own, which has none of the daemon's sockets.
///
/// A thread that waits in the kernel for I/O of a device keeps its process from ending, whatever signal that gets. If it
/// was the daemon's, a daemon that is killed would answer nothing any more and still keep its ends of the connections:
/// the I/O would not end, nor would the daemon, and none could follow it. The partition table alone makes such a wait,
/// which the kernel reads when a device is opened first.
///
/// The process is this program again; its first argument is `option`. It writes one line for each remark and a last one
/// that says how it went, and ends when the daemon closes its end of the socket between them, or ends itself.
package final class DeviceProcess: Sendable {
    private static let option = "--device-work"
    /// Its name in ps.
    static let name = "qbdd:device"

    /// What a line begins with. Behind `failure` stands the errno, a space and the text.
    private enum Kind {
        static let remark: Character = "-"
        static let done: Character = "+"
        static let failure: Character = "!"
    }

    private let child: pid_t
    /// The socket to it; -1 when it was released.
    private let socket: Atomic<Int32>
    private let remarks: [String]

    /// Begins the work and returns when it is done; what it keeps, it keeps until `release`. May take for ever: never on
    /// a loop.
    package init(
        _ work: DeviceWork, _ device: KernelDevice, _ identifier: DeviceIdentifier
    ) throws(KernelDeviceError) {
        var ends: [Int32] = [-1, -1]
        do throws(SystemError) {
            try retrying("make a pair of sockets") {
                socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends)
            }
        } catch { throw KernelDeviceError(error) }
        let (ours, its) = (ends[0], ends[1])
        defer { close(its) }
        do throws(SystemError) {
            // This program, even when another file has taken its place on the disk since.
            child = try ChildProcess.spawn(
                "/proc/self/exe", ["qbdd", Self.option, String(device.index), "\(identifier)"] + work.words,
                input: its, output: its, errors: STDERR_FILENO)
        } catch {
            close(ours)
            throw KernelDeviceError(error)
        }
        var remarks: [String] = []
        do throws(KernelDeviceError) {
            try Self.readLines(ours) { remarks.append($0) }
        } catch {
            Self.end(child, ours)
            throw error
        }
        self.remarks = remarks
        socket = Atomic(ours)
    }

    deinit { release() }

    /// The same for work that keeps nothing.
    /// - Returns: one line for each thing that is not as it should be.
    package static func run(
        _ work: DeviceWork, _ device: KernelDevice, _ identifier: DeviceIdentifier
    ) throws(KernelDeviceError) -> [String] {
        let process = try DeviceProcess(work, device, identifier)
        end(process.child, process.socket.exchange(-1, ordering: .relaxed))
        return process.remarks
    }

    /// Lets go of what it keeps. The driver is not done with a device before the process has ended, which may wait for
    /// I/O; this does not.
    package func release() {
        let socket = socket.exchange(-1, ordering: .relaxed)
        guard socket >= 0 else { return }
        do throws(SystemError) {
            try Thread(name: "qbd:reap") { [child] in Self.end(child, socket) }.detach()
        } catch { close(socket) }  // Ended, it keeps its process number until the daemon ends.
    }

    private static func end(_ child: pid_t, _ socket: Int32) {
        close(socket)
        var status: Int32 = 0
        while waitpid(child, &status, 0) < 0, errno == EINTR {}
    }

    private static func readLines(_ socket: Int32, _ remark: (String) -> Void) throws(KernelDeviceError) {
        var text: [UInt8] = []
        while true {
            while let end = text.firstIndex(of: UInt8(ascii: "\n")) {
                let line = String(decoding: text[..<end], as: UTF8.self)
                text.removeSubrange(...end)
                switch line.first {
                case Kind.remark: remark(String(line.dropFirst()))
                case Kind.done: return
                default:
                    let parts = line.dropFirst().split(separator: " ", maxSplits: 1).map { String($0) }
                    throw KernelDeviceError(code: parts.first.flatMap { Int32($0) } ?? EPROTO, parts.last ?? line)
                }
            }
            var count = 0
            text += [UInt8](unsafeUninitializedCapacity: 4096) { buffer, filled in
                repeat { count = read(socket, buffer.baseAddress, buffer.count) } while count < 0 && errno == EINTR
                filled = max(count, 0)
            }
            guard count > 0 else {
                throw KernelDeviceError(code: ECHILD, "the process '\(name)' of a device was ended by somebody")
            }
        }
    }

    /// Whether a program's arguments are those of such a process for a device, whatever daemon began it.
    static func isWorker(_ arguments: [String], on device: KernelDevice) -> Bool {
        arguments.count > 2 && arguments[1] == option && arguments[2] == String(device.index)
    }

    // MARK: In the process

    /// The whole of such a process.
    /// - Parameter arguments: of the program.
    /// - Returns: its exit status; nil when the arguments are not those of a device's process.
    package static func main(_ arguments: [String]) -> Int32? {
        guard arguments.count > 1, arguments[1] == option else { return nil }
        guard arguments.count > 4, let index = UInt32(arguments[2]), let identifier = DeviceIdentifier(arguments[3]),
            let work = DeviceWork(words: Array(arguments[4...]))
        else {
            say("qbdd: \(option) is for the daemon's own use", to: STDERR_FILENO)
            return EINVAL
        }
        pthread_setname_np(pthread_self(), name)
        do throws(KernelDeviceError) {
            let claim = try work.perform(KernelDevice(index: index), identifier) { say("\(Kind.remark)\($0)") }
            say("\(Kind.done)")
            withExtendedLifetime(claim) {
                var byte: UInt8 = 0
                while read(STDIN_FILENO, &byte, 1) < 0, errno == EINTR {}
            }
            return 0
        } catch {
            say("\(Kind.failure)\(error.code) \(error.message)")
            return 1
        }
    }

    /// A daemon that has gone hears nothing, and needs nothing.
    private static func say(_ text: String, to descriptor: Int32 = STDOUT_FILENO) {
        let line = Array((text.replacing("\n", with: "; ") + "\n").utf8)
        _ = write(descriptor, line, line.count)
    }
}
