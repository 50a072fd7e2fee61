import EventLoop
import Synchronization

/// Which volumes of this process have how many connections to which store. A store has room for so many, and a volume
/// that has several gives one back for another that has none. From any thread.
final class StoreGuests: Sendable {
    static let shared = StoreGuests()

    private struct Guest {
        let volume: Weak
        var connections: Int
    }

    private struct Weak: @unchecked Sendable {
        // Only the volume's loop does anything with it.
        weak var volume: PureFlashVolume?
    }

    private struct Place: Hashable {
        let name: String
        let port: UInt16
    }

    private let guests = Mutex<[Place: [ObjectIdentifier: Guest]]>([:])

    /// - Parameter connections: of the volume to the store, that are ready.
    func note(_ volume: PureFlashVolume, at name: String, connections: Int) {
        let place = Place(name: name, port: volume.settings.port)
        guests.withLock { guests in
            if connections > 0 {
                guests[place, default: [:]][ObjectIdentifier(volume)] =
                    Guest(volume: Weak(volume: volume), connections: connections)
            } else {
                guests[place]?[ObjectIdentifier(volume)] = nil
                if guests[place]?.isEmpty == true { guests[place] = nil }
            }
        }
    }

    /// Has the volume that has the most connections to a store give one of them back, for one that has none.
    /// - Returns: its name; nil when no other has more than one.
    func makeRoom(at name: String, for volume: PureFlashVolume) -> String? {
        let place = Place(name: name, port: volume.settings.port)
        let most = guests.withLock { guests in
            guests[place]?.filter { $0.key != ObjectIdentifier(volume) && $0.value.connections > 1 }
                .max { $0.value.connections < $1.value.connections }?.value.volume.volume
        }
        guard let most else { return nil }
        let needy = volume.opened.name
        most.loop.post { most.giveBack(at: name, for: needy) }
        return most.opened.name
    }
}
