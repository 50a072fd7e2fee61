import Backend
import CLinux
import EventLoop
import Glibc

// A volume's description is replaced as a whole, with one rename, also where there is no space left.
extension LocalPool {
    /// Bytes of the spare file, unless there are larger descriptions.
    private static let spareSize = 64 << 10

    /// Writes a volume's description anew, durably and at once. On an error it is the old one; or the new one, which may be
    /// the old one again after a power cut.
    func replaceDescription(
        _ directory: borrowing Directory, _ description: VolumeDescription
    ) throws(BackendError) {
        try putInPlace(directory, try draft(directory, description), of: description)
        try directory.synchronize()
    }

    /// The same for a volume that is new. EEXIST when there is one of its name.
    func placeDescription(
        _ directory: borrowing Directory, _ description: VolumeDescription
    ) throws(BackendError) {
        let draft = try draft(directory, description)
        do throws(BackendError) {
            try directory.renameNew(draft, to: Self.description(description.record.volume))
        } catch {
            removeDraft(directory, draft)
            throw error
        }
        try directory.synchronize()
    }

    /// Writes down a description that `putInPlace` makes the volume's.
    /// - Returns: the draft's name. The next look at the pool removes it.
    func draft(_ directory: borrowing Directory, _ description: VolumeDescription) throws(BackendError) -> String {
        let draft = Self.ours + Self.description(description.record.volume) + Self.fresh
        let text = description.encode()
        do throws(BackendError) {
            try directory.write(text, to: draft)
            return draft
        } catch {
            removeDraft(directory, draft)
            guard error.code == ENOSPC || error.code == EDQUOT,
                try directory.overwrite(Self.spare, with: text)
            else { throw error }
            return Self.spare
        }
    }

    func putInPlace(
        _ directory: borrowing Directory, _ draft: String, of description: VolumeDescription
    ) throws(BackendError) {
        do throws(BackendError) {
            try directory.rename(draft, to: Self.description(description.record.volume))
        } catch {
            removeDraft(directory, draft)
            throw error
        }
    }

    /// Where it cannot be removed, the next look at the pool does.
    func removeDraft(_ directory: borrowing Directory, _ draft: String) {
        guard draft != Self.spare else { return }
        do throws(BackendError) { try directory.remove(draft) } catch {}
    }

    /// Sees to it that a description of this size can be written when there is no space. Only what is there helps, so that
    /// nothing depends on its success.
    func keepSpare(_ directory: borrowing Directory, for description: VolumeDescription) {
        let wanted = max(Self.spareSize, (description.encode().utf8.count + 4096) * 2 / 4096 * 4096)
        do throws(BackendError) {
            if let status = try directory.status(of: Self.spare), Int(status.st_size) >= wanted { return }
            try directory.fill(Self.spare, with: wanted)
        } catch {
            reportOnce("pool \(name): no space is kept for deleting snapshots when it is full: \(error.message)")
        }
    }
}
