import Control
import FoundationEssentials
import Testing

@Suite("What qbd prints")
struct TextTests {
    private var mapping: MappingRecord { .example }

    @Test("the list has exactly the documented header and columns")
    func list() {
        #expect(
            MappingTable.text([mapping]) == """
                dev_id  vol_id  device  volume  config  read_bps    write_bps   read_iops   write_iops
                0   0x3ff7000000    qbd0    csi/foo1    /etc/neonsan/qbd.conf   0   0   0   0

                """)
    }

    @Test("an empty list is the header alone")
    func emptyList() {
        #expect(
            MappingTable.text([])
                == "dev_id  vol_id  device  volume  config  read_bps    write_bps   read_iops   write_iops\n")
    }

    @Test("every line of the list has nine fields, none empty")
    func fields() {
        var exported = mapping
        exported.device = "-"
        exported.limits.writeBytes = 1 << 40
        for line in MappingTable.text([mapping, exported]).split(separator: "\n") {
            #expect(line.split(separator: " ").count == 9, "\(line)")
        }
    }

    @Test("the volumes of a pool are a table without blanks in its fields")
    func volumes() {
        let volume = PoolVolume(volume: "a/b", id: 0x1_000_000, size: 64 << 20, blockSize: 512, created: 1_700_000_000)
        let other = PoolVolume(volume: "t/b", id: 0x2_000_000, size: 64 << 20, blockSize: 512, created: nil)
        #expect(
            VolumeTable.text([volume, other]) == """
                vol_id     volume  size      block_size  created
                0x1000000  a/b     67108864  512         2023-11-14T22:13:20Z
                0x2000000  t/b     67108864  512         -

                """)
    }

    @Test("damaged volumes and pools without room are said beside the others")
    func damagedVolumes() throws {
        let volume = PoolVolume(volume: "p/b", id: 1, size: 512, blockSize: 512, created: 1)
        var answer = VolumesRequest.Answer(volumes: [volume], problems: [])
        #expect(answer.rows == [volume])
        #expect(answer.remarks == [])
        answer.damaged = [.init(volume: "p/a", reason: "its description \u{1b}[2J is empty")]
        answer.spaces = [
            .init(pool: "p", total: 100 << 30, free: 1 << 30, nearlyFull: true),
            .init(pool: "q", total: 100 << 30, free: 99 << 30, nearlyFull: false),
        ]
        #expect(
            answer.remarks == [
                "p/a is damaged: its description \\u{1b}[2J is empty",
                "the pool p is nearly full: 1 GiB (1073741824 B) of 100 GiB (107374182400 B) are free;"
                    + " delete volumes or snapshots, or make room otherwise",
            ])
        #expect(answer.rows.map(\.volume) == ["p/a", "p/b"])
        #expect(answer.rows.map { $0.damaged != nil } == [true, false])
        #expect(answer.rows.allSatisfy { $0.poolNearlyFull == true })
        #expect(VolumeTable.text(answer.volumes).split(separator: "\n").count == 2, "the table has what can be used")
    }

    @Test("info says that flushes fail and that the pool fills up")
    func trouble() {
        var mapping = mapping
        mapping.flushesFailSince = 1_700_000_000
        let none = MappingStatus.Percentiles(count: 0, p50: 0, p90: 0, p99: 0, p999: 0, max: 0)
        let status = MappingStatus(
            mapping: mapping,
            counters: .init(
                reads: 0, writes: 0, flushes: 0, trims: 0, readBytes: 0, writtenBytes: 0, errors: 0, slow: 0,
                inFlight: 0),
            heldBack: .init(requests: 0, oldest: 0), latency: .init(reads: none, writes: none, flushes: none),
            room: .init(pool: "p", total: 2048, free: 1024, nearlyFull: true))
        let text = StatusText.text(status)
        #expect(text.contains("flushes fail:  since 2023-11-14T22:13:20Z: what was acknowledged may be lost"))
        #expect(text.contains("NEARLY FULL"))
    }

    @Test("info names everything, aligned")
    func info() {
        let none = MappingStatus.Percentiles(count: 0, p50: 0, p90: 0, p99: 0, p999: 0, max: 0)
        let some = MappingStatus.Percentiles(count: 10, p50: 12.34, p90: 50, p99: 99.96, p999: 1234.5, max: 2000)
        let status = MappingStatus(
            mapping: mapping,
            counters: .init(
                reads: 10, writes: 0, flushes: 0, trims: 0, readBytes: 40961, writtenBytes: 0, errors: 0, slow: 0,
                inFlight: 2),
            heldBack: .init(requests: 0, oldest: 0),
            latency: .init(reads: some, writes: none, flushes: none))
        #expect(
            StatusText.text(status) == """
                volume:        csi/foo1
                volume id:     0x3ff7000000
                device:        /dev/qbd0
                uri:           nbd+unix:///csi/foo1?socket=/run/qbd/nbd.sock
                size:          1 GiB (1073741824 B)
                block size:    512 B
                protocol:      local
                access:        read-write
                config:        /etc/neonsan/qbd.conf
                state:         normal since 2023-11-14T22:13:20Z
                health:        idle since 2023-11-14T22:13:20Z
                connections:   1
                limits:        none
                reads:         10, 40.00 KiB (40961 B)
                writes:        0, 0 B
                flushes:       0
                trims:         0
                errors:        0
                slow:          0
                in flight:     2
                held back:     0
                read latency:  p50 12.3 us, p90 50.0 us, p99 100.0 us, p99.9 1235 us, max 2000 us
                write latency: - (none yet)
                flush latency: - (none yet)

                """)
    }

    @Test("info shows a cluster's shards and stores, and why I/O waits")
    func cluster() throws {
        let none = MappingStatus.Percentiles(count: 0, p50: 0, p90: 0, p99: 0, p999: 0, max: 0)
        let owners = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1", nil]
        let status = MappingStatus(
            mapping: mapping,
            counters: .init(
                reads: 0, writes: 0, flushes: 0, trims: 0, readBytes: 0, writtenBytes: 0, errors: 0, slow: 0,
                inFlight: 4),
            heldBack: .init(requests: 0, oldest: 0),
            latency: .init(reads: none, writes: none, flushes: none),
            conductor: "192.0.2.9:49180",
            shards: owners.enumerated().map { .init(index: $0, stores: $1.map { [$0] } ?? [], store: $1) },
            stores: [
                .init(address: "192.0.2.1", state: "connected", connections: 2, inFlight: 3, trouble: nil),
                .init(address: "192.0.2.2", state: "lost", connections: 0, inFlight: 0, trouble: "connect: no"),
                .init(address: "192.0.2.3", state: "unused", connections: 0, inFlight: 0, trouble: nil),
            ],
            waits: "a request waits for 2.0 s: store 192.0.2.2: connect: no")
        #expect(
            StatusText.text(status).contains(
                """
                conductor:     192.0.2.9:49180
                shards:        5, no store serves 4
                store:         192.0.2.1, connected, shards 0-1 3, 2 connections, 3 in flight
                store:         192.0.2.2, lost, shard 2, 0 connections, 0 in flight; connect: no
                store:         192.0.2.3, unused, no shard, 0 connections, 0 in flight
                waits:         a request waits for 2.0 s: store 192.0.2.2: connect: no

                """))
        #expect(try JSONDecoder().decode(MappingStatus.self, from: JSONEncoder().encode(status)) == status)
    }

    @Test("info says why I/O waits, and for how long")
    func heldBack() {
        let none = MappingStatus.Percentiles(count: 0, p50: 0, p90: 0, p99: 0, p999: 0, max: 0)
        var status = MappingStatus(
            mapping: mapping,
            counters: .init(
                reads: 0, writes: 0, flushes: 0, trims: 0, readBytes: 0, writtenBytes: 0, errors: 0, slow: 0,
                inFlight: 3),
            heldBack: .init(requests: 3, oldest: 61_290, by: "suspended"),
            latency: .init(reads: none, writes: none, flushes: none))
        #expect(StatusText.text(status).contains("held back:     3, the oldest for 61.2 s: the volume is suspended\n"))
        status.heldBack.by = "throttle"
        status.mapping.limits.writeBytes = 4096
        #expect(
            StatusText.text(status).contains("held back:     3, the oldest for 61.2 s: they wait for their limits\n"))
        #expect(
            StatusText.text(status).contains(
                "limits:        read_bps=unlimited write_bps=4096 read_iops=unlimited write_iops=unlimited burst_ms=100\n"
            ))
    }

    @Test("JSON has the list's columns under their names, flat")
    func json() throws {
        #expect(
            try ControlJSON.compact([mapping]) == """
                [{"block_size":512,"burst_ms":100,"config":"/etc/neonsan/qbd.conf","connections":1,"dev_id":0,"device":"qbd0",\
                "health":"idle","health_since":1700000000,"protocol":"local","read_bps":0,"read_iops":0,"read_only":false,"since":1700000000,"size":1073741824,\
                "state":"normal","uri":"nbd+unix:///csi/foo1?socket=/run/qbd/nbd.sock","vol_id":"0x3ff7000000",\
                "volume":"csi/foo1","write_bps":0,"write_iops":0}]
                """)
    }

    @Test(
        "times are RFC 3339 in UTC", arguments: [(0, "1970-01-01T00:00:00Z"), (1_795_222_923, "2026-11-21T01:02:03Z")])
    func times(seconds: Int64, text: String) {
        #expect(Calendar.text(seconds) == text)
    }
}

extension MappingRecord {
    static let example = MappingRecord(
        deviceID: 0, id: 0x3f_f700_0000, device: "qbd0", volume: "csi/foo1", config: "/etc/neonsan/qbd.conf",
        limits: .none, state: "normal", since: 1_700_000_000,
        health: "idle", healthSince: 1_700_000_000, size: 1 << 30, blockSize: 512, transport: "local",
        readOnly: false, uri: "nbd+unix:///csi/foo1?socket=/run/qbd/nbd.sock", connections: 1)
}
