import Backend
import CLinux
import EventLoop
import Glibc

/// Which layer of a chain has each cluster: a look-up is one byte, however many layers there are. And how far the map
/// file of the head is behind, for a volume that is written to.
///
/// Memory is spent on what lies above the first layer. One thread at a time.
final class ChainMap {
    /// How a cluster of the head stands in its map file.
    enum Stage {
        /// The head does not have it.
        static let none: UInt8 = 0
        /// The map file says that the head has it for good.
        static let marked: UInt8 = 1
        /// The head has it since the data was synchronised last; the map file says so for this boot.
        static let fresh: UInt8 = 2
        /// Its data is being synchronised, or is, and the map file is written next.
        static let settling: UInt8 = 3
    }

    /// Clusters of a page of `pages`.
    static let page = 4096

    private(set) var clusters: Int
    /// Index of the layer in the chain, 0 for the first; `head` for the last.
    private(set) var entries: UnsafeMutablePointer<UInt8>
    private(set) var stages: UnsafeMutablePointer<UInt8>
    /// Which pages hold clusters that are fresh or settling.
    private(set) var pages: UnsafeMutablePointer<UInt8>
    let head: UInt8
    /// Clusters that are fresh.
    var fresh = 0

    init(clusters: Int, head: Int) throws(BackendError) {
        self.clusters = clusters
        self.head = UInt8(head)
        entries = try Self.allocate(clusters)
        do throws(BackendError) {
            stages = try Self.allocate(clusters)
        } catch {
            Self.free(entries, clusters)
            throw error
        }
        do throws(BackendError) {
            pages = try Self.allocate(Self.pageCount(clusters))
        } catch {
            Self.free(entries, clusters)
            Self.free(stages, clusters)
            throw error
        }
    }

    deinit {
        Self.free(entries, clusters)
        Self.free(stages, clusters)
        Self.free(pages, Self.pageCount(clusters))
    }

    var pageCount: Int { Self.pageCount(clusters) }
    private static func pageCount(_ clusters: Int) -> Int { (clusters + page - 1) / page }

    /// Zeros, which take no memory until they are changed.
    private static func allocate(_ count: Int) throws(BackendError) -> UnsafeMutablePointer<UInt8> {
        let area = mmap(
            nil, max(count, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let area, area != qbd_map_failed() else {
            throw BackendError(code: ENOMEM, message: "no address space for the map of \(count) clusters")
        }
        return area.bindMemory(to: UInt8.self, capacity: count)
    }

    private static func free(_ area: UnsafeMutablePointer<UInt8>, _ count: Int) { munmap(area, max(count, 1)) }

    /// What is new belongs to the first layer, which has holes there.
    func grow(to count: Int) throws(BackendError) {
        guard count > clusters else { return }
        let larger = try ChainMap(clusters: count, head: Int(head))
        memcpy(larger.entries, entries, clusters)
        memcpy(larger.stages, stages, clusters)
        memcpy(larger.pages, pages, pageCount)
        swap(&larger.entries, &entries)
        swap(&larger.stages, &stages)
        swap(&larger.pages, &pages)
        // The smaller areas go with the other map.
        (larger.clusters, clusters) = (clusters, count)
    }

    /// While the volume is opened.
    func set(_ run: Range<Int>, to layer: Int, stage: UInt8 = Stage.none) {
        memset(entries + run.lowerBound, Int32(layer), run.count)
        if stage != Stage.none { memset(stages + run.lowerBound, Int32(stage), run.count) }
    }

    @inline(__always)
    func isHead(_ cluster: Int) -> Bool { entries[cluster] == head }

    /// The clusters from the first on that the same layer has, at most `limit` of them.
    func run(from first: Int, limit: Int) -> Int {
        let entry = entries[first]
        var next = first &+ 1
        while next < first &+ limit, entries[next] == entry { next &+= 1 }
        return next &- first
    }

    /// The head has the cluster from now on, its data being written and not synchronised, and the map file says so for
    /// this boot.
    @inline(__always)
    func take(_ cluster: Int) {
        entries[cluster] = head
        guard stages[cluster] == Stage.none else { return }
        stages[cluster] = Stage.fresh
        pages[cluster / Self.page] = 1
        fresh &+= 1
    }

    // MARK: Towards the map file

    /// All that is fresh is about to be synchronised.
    /// - Returns: whether there was anything.
    func settleFresh() -> Bool {
        guard fresh > 0 else { return false }
        forEachCluster(at: Stage.fresh) { stages[$0] = Stage.settling }
        fresh = 0
        return true
    }

    /// Synchronising failed.
    func unsettle() {
        forEachCluster(at: Stage.settling) {
            stages[$0] = Stage.fresh
            fresh &+= 1
        }
    }

    /// The map file is written.
    func markSettled() {
        for page in 0..<pageCount where pages[page] != 0 {
            let range = clusters(of: page)
            var isBehind = false
            for cluster in range {
                if stages[cluster] == Stage.settling {
                    stages[cluster] = Stage.marked
                } else if stages[cluster] == Stage.fresh {
                    isBehind = true
                }
            }
            pages[page] = isBehind ? 1 : 0
        }
    }

    /// The next run of clusters to be marked in the map file.
    func nextSettling(from start: Int) -> Range<Int>? {
        var cluster = start
        while cluster < clusters {
            if pages[cluster / Self.page] == 0 {
                cluster = (cluster / Self.page + 1) * Self.page
                continue
            }
            if stages[cluster] == Stage.settling {
                let first = cluster
                while cluster < clusters, cluster - first < Marks.count, stages[cluster] == Stage.settling {
                    cluster += 1
                }
                return first..<cluster
            }
            cluster += 1
        }
        return nil
    }

    private func clusters(of page: Int) -> Range<Int> {
        page * Self.page..<min((page + 1) * Self.page, clusters)
    }

    private func forEachCluster(at stage: UInt8, _ body: (Int) -> Void) {
        for page in 0..<pageCount where pages[page] != 0 {
            for cluster in clusters(of: page) where stages[cluster] == stage { body(cluster) }
        }
    }
}
