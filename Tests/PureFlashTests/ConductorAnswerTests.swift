import Backend
import Glibc
import PureFlash
import Testing

/// Answers of a running conductor, and what must not be taken for one.
@Suite struct ConductorAnswerTests {
    /// As recorded, spaces taken out; each test changes one thing.
    static let recorded = """
        {"status":"OK","volume_name":"test_v1","volume_size":2147483648,"volume_id":1107296256,"shard_count":1,\
        "rep_count":1,"meta_ver":0,"snap_seq":-1,"shards":[{"index":0,"store_ips":"127.0.0.1","status":"OK",\
        "is_shareddisk":0}],"shard_lba_cnt_order":36,"op":"open_volume_reply","ret_code":0}
        """

    static func changed(_ old: String, _ new: String) throws -> [UInt8] {
        let pieces = recorded.split(separator: old, omittingEmptySubsequences: false)
        try #require(pieces.count == 2, "\(old) stands in the answer once")
        return Array((pieces[0] + new + pieces[1]).utf8)
    }

    @Test func theRecordedOne() throws {
        let layout = try VolumeLayout(decoding: Array(Self.recorded.utf8))
        #expect(
            layout
                == VolumeLayout(
                    id: 0x4200_0000, size: 2 << 30, metaVersion: 0, snapshot: .max,
                    shards: [.init(addresses: ["127.0.0.1"])]))
    }

    @Test func severalStoresAndShards() throws {
        let shards = """
            "volume_size":140000000000,"volume_id":1107296256,"shard_count":3,"rep_count":1,"meta_ver":7,"snap_seq":2,\
            "shards":[{"index":2,"store_ips":""},{"index":0,"store_ips":"10.0.0.1, 10.0.0.2"},\
            {"index":1,"store_ips":"fe80::1"}]
            """
        let layout = try VolumeLayout(decoding: Array("{\(shards),\"ret_code\":0}".utf8))
        #expect(layout.size == 140_000_000_000)
        #expect(layout.metaVersion == 7)
        #expect(layout.snapshot == 2)
        #expect(layout.shards.map(\.addresses) == [["10.0.0.1", "10.0.0.2"], ["fe80::1"], []])
    }

    @Test(arguments: [
        ("2147483648", "0"), ("2147483648", "2147483649"), ("2147483648", "-1"), ("2147483648", "99999999999"),
        ("2147483648", "99999999999999999999"), ("1107296256", "1107296257"), ("1107296256", "0"),
        ("\"shard_count\":1", "\"shard_count\":2"), ("\"index\":0", "\"index\":1"), ("127.0.0.1", "example.org"),
        ("127.0.0.1", "127.0.0.1:49162"), (":36", ":35"), (":36", ":-1"), (":36", ":9999"),
        ("\"snap_seq\":-1", "\"snap_seq\":-2"), ("\"snap_seq\":-1", "\"snap_seq\":0"), ("\"shards\"", "\"shreds\""),
        ("{\"status\"", "\"status\""),
    ])
    func whatIsNotUnderstoodIsRefused(old: String, new: String) throws {
        let answer = try Self.changed(old, new)
        #expect { try VolumeLayout(decoding: answer) } throws: { ($0 as? BackendError)?.code == 71 }
    }

    @Test("a volume has the size that its shards hold")
    func tooFewShards() throws {
        let layout = try VolumeLayout(decoding: try Self.changed("2147483648", "107374182400"))
        #expect(layout.size == 64 << 30)
        #expect(layout.recordedSize == 100 << 30)
        #expect(layout.shards.count == 1)
        #expect(layout.sizeLimit == 64 << 30, "nothing was said of more shards")
        let adding = try Self.changed("\"shard_count\":1", "\"shard_count\":1,\"adds_shards\":1")
        #expect(try VolumeLayout(decoding: adding).sizeLimit > 64 << 30)
    }

    @Test("the shards that a volume had before it was made smaller are left alone")
    func tooManyShards() throws {
        let answer = try Self.changed("\"shard_count\":1", "\"shard_count\":2")
        let more = "\"shards\":[{\"index\":1,\"store_ips\":\"127.0.0.2\"},"
        let text = String(decoding: answer, as: UTF8.self).replacing("\"shards\":[", with: more)
        let layout = try VolumeLayout(decoding: Array(text.utf8))
        #expect(layout.shards.map(\.addresses) == [["127.0.0.1"]])
    }

    @Test(
        "what a conductor means by an invalid argument for a new volume",
        arguments: [
            ("volume already exists: v", EEXIST), ("no enough volume capacity", ENOSPC),
            ("Tenant not exists: t", ENOENT),
            ("rep_cnt", EINVAL), ("only 2 stores available but replica is 3", EINVAL),
            ("only 0 stores available but replica is 1", EHOSTDOWN),
        ])
    func creatingWhatCannotBe(reason: String, expected: Int32) {
        let answer = Array("{\"ret_code\":2,\"reason\":\"\(reason)\"}".utf8)
        #expect {
            try ConductorStatus.decode(ConductorStatus.self, "create_volume", answer)
        } throws: {
            ($0 as? BackendError)?.code == expected
        }
    }

    /// As a real conductor answered, and what no store is.
    @Test func storesThatAreBelievedAlive() throws {
        let answer = """
            {"store_nodes":[{"id":1,"status":"OK","mngt_ip":"127.0.0.1"},{"id":2,"status":"OFFLINE","mngt_ip":"127.0.0.2"},
            {"id":3,"status":"OK","mngt_ip":"a\\u001b[2J.example"}],"op":"list_store_reply","ret_code":0}
            """
        let stores = try ConductorStatus.decode(ListStoreAnswer.self, "list_store", Array(answer.utf8))
        #expect(stores.alive == ["127.0.0.1"])
    }

    /// As a real conductor answered.
    @Test(
        "what a conductor means by an invalid argument for a snapshot",
        arguments: [
            ("create_snapshot", "Snapshot s1 already exists", EEXIST),
            ("create_snapshot", "Volume t/v not found", ENOENT),
            ("delete_snapshot", "Volume tenant_default/x1 has no snapshot:s1", ENOENT),
            ("delete_snapshot", "Volume t/v has ongoing task", EBUSY),
        ])
    func snapshotsThatCannotBe(operation: String, reason: String, expected: Int32) {
        let answer = Array("{\"reason\":\"\(reason)\",\"op\":\"\(operation)_reply\",\"ret_code\":2}".utf8)
        #expect {
            try ConductorStatus.decode(ConductorStatus.self, operation, answer)
        } throws: {
            ($0 as? BackendError)?.code == expected
        }
    }

    @Test(
        "a store that is not ready yet is no missing volume",
        arguments: [
            ("Volume:t:v not exists", ENOENT), ("no volume v in tenant t", ENOENT),
            ("no tenant 't'; tenants are pools", ENOENT), ("no snapshot 's' of volume t/v", ENOENT),
            ("Volume:t:v in status (ERROR) can't be opened", EHOSTDOWN),
            ("Failed to prepare volume v on store:192.0.2.1, for:busy", EHOSTDOWN), ("", EHOSTDOWN),
        ])
    func openingWhatIsNotReady(reason: String, expected: Int32) {
        let answer = Array("{\"ret_code\":2,\"reason\":\"\(reason)\"}".utf8)
        #expect { try VolumeLayout(decoding: answer) } throws: { ($0 as? BackendError)?.code == expected }
    }

    @Test(arguments: [(2, 112), (6, 17), (7, 16), (1, 121), (99, 121)])
    func refusals(code: Int, expected: Int) throws {
        let answer = Array("{\"ret_code\":\(code),\"reason\":\"not today\"}".utf8)
        #expect { try VolumeLayout(decoding: answer) } throws: { error in
            let error = error as? BackendError
            return error?.code == Int32(expected) && error?.message.contains("not today") == true
        }
    }
}

@Suite("The address of a conductor in ZooKeeper")
struct ConductorAddressTests {
    @Test("an IP address means the usual port; another one can stand behind it")
    func addresses() {
        // As recorded: the node conductor0000000000 of a real cluster.
        let recorded: [UInt8] = [0x31, 0x32, 0x37, 0x2e, 0x30, 0x2e, 0x30, 0x2e, 0x31]
        #expect(ConductorDiscovery.endpoint(recorded) == .init(host: "127.0.0.1", port: 49180))
        for (text, host, port) in [
            ("192.0.2.1:80", "192.0.2.1", 80), ("2001:db8::1", "2001:db8::1", 49180),
            ("[2001:db8::1]:65535", "2001:db8::1", 65535),
        ] {
            #expect(ConductorDiscovery.endpoint(Array(text.utf8)) == .init(host: host, port: port))
        }
    }

    @Test(
        "anything else is none",
        arguments: [
            "", " ", "host", "host:80", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1 ", ":80", "[",
        ])
    func nonsense(_ text: String) {
        #expect(ConductorDiscovery.endpoint(Array(text.utf8)) == nil)
    }

    @Test("bytes that are no text are none")
    func noText() {
        #expect(ConductorDiscovery.endpoint([0x31, 0xff]) == nil)
        #expect(ConductorDiscovery.endpoint([]) == nil)
    }
}
