import CLinux
import EventLoop
import Glibc

/// Listens for connections of kernel devices that die (NBD_CMD_LINK_DEAD). Lives on its loop's thread.
///
/// Works before the driver is loaded and after it was loaded again: the controller tells of each family that comes.
package final class KernelLinkWatcher: EventSource {
    package enum Event: Equatable, Sendable {
        /// A connection of /dev/nbdX has died.
        case dead(index: UInt32)
        /// The kernel had no room for more messages: any connection may have died.
        case lost
    }

    private let loop: EventLoop
    private let socket: NetlinkSocket
    private let handler: (Event) -> Void
    private var token: EventLoop.Token?
    private var family: GenericFamily?

    /// On the loop's thread, though the driver is looked for here: the kernel answers at once. Where it is not loaded,
    /// nothing is heard until it is.
    package init(loop: EventLoop, handler: @escaping (Event) -> Void) throws(KernelDeviceError) {
        self.loop = loop
        self.handler = handler
        do throws(SystemError) {
            socket = try NetlinkSocket(receiveTimeout: nil)
        } catch { throw KernelDeviceError(error) }
        var asking: NetlinkSocket
        do throws(SystemError) {
            asking = try NetlinkSocket(receiveTimeout: KernelDevices.answerTimeout)
        } catch { throw KernelDeviceError(error) }
        let controller = try KernelDevices.family(GenericNetlink.controllerName, &asking)
        do throws(SystemError) {
            if let group = controller.groups[GenericNetlink.controllerGroup] { try socket.join(group: group) }
        } catch { throw KernelDeviceError(error) }
        // Only asked for when it is there: the question alone would load the module.
        let isLoaded: Bool
        do throws(SystemError) { isLoaded = try KernelDriver().isLoaded } catch { throw KernelDeviceError(error) }
        if isLoaded { join(try KernelDevices.family(KernelNBD.NBD_GENL_FAMILY_NAME, &asking)) }
        do throws(SystemError) {
            token = try loop.add(socket.descriptor, events: EPOLLIN.rawValue, source: self)
        } catch { throw KernelDeviceError(error) }
    }

    /// Stops listening; on the loop's thread.
    package func close() {
        if let token { loop.remove(token, descriptor: socket.descriptor) }
        token = nil
    }

    package func ready(events: UInt32) {
        while token != nil {
            let datagram: [UInt8]
            do throws(SystemError) {
                datagram = try socket.receive("listen for dead connections")
            } catch {
                switch error.code {
                case EAGAIN: return
                case ENOBUFS: handler(.lost)
                default:
                    handler(.lost)
                    return
                }
                continue
            }
            handle(datagram)
        }
    }

    private func handle(_ datagram: [UInt8]) {
        do throws(NetlinkFormatError) {
            for message in try NetlinkMessage.decode(datagram) {
                if message.type == GenericNetlink.GENL_ID_CTRL {
                    let generic = try GenericMessage(message)
                    guard generic.command == GenericNetlink.CTRL_CMD_NEWFAMILY else { continue }
                    join(try GenericFamily(generic))
                } else if message.type == family?.id {
                    let generic = try GenericMessage(message)
                    guard generic.command == KernelNBD.NBD_CMD_LINK_DEAD else { continue }
                    handler(.dead(index: try generic.index(of: KernelNBD.NBD_CMD_LINK_DEAD)))
                }
            }
        } catch {
            // What the kernel says cannot be read: then it may have said anything.
            handler(.lost)
        }
    }

    private func join(_ family: GenericFamily) {
        guard family.name == KernelNBD.NBD_GENL_FAMILY_NAME,
            let group = family.groups[KernelNBD.NBD_GENL_MCAST_GROUP_NAME]
        else { return }
        do throws(SystemError) {
            try socket.join(group: group)
            self.family = family
        } catch {
            // The family went away again; its next coming is announced like this one.
            handler(.lost)
        }
    }
}
