import Configuration
import Testing

@Suite("qbd.conf: meaning")
struct DaemonConfigurationTests {
    @Test("An empty file means the defaults", arguments: ["", "\n\n", "# nothing\n", "\u{FEFF}", "\r\n", "[client]"])
    func defaults(text: String) throws {
        let configuration = try configuration(text)
        #expect(configuration.zookeeper.ip == [])
        #expect(configuration.zookeeper.clusterName == nil)
        #expect(configuration.conductor.endpoints == [])
        #expect(configuration.client.tcpNoDelay)
        #expect(configuration.client.ioDepth == 64)
        #expect(configuration.client.connectionsPerStore == 1)
        #expect(configuration.client.storePort == 49162 && configuration.client.storeHTTPPort == 49181)
        #expect(configuration.client.storeGrace == .seconds(6))
        #expect(configuration.client.ioTimeout == .seconds(30))
        #expect(configuration.client.connTimeout == .seconds(8))
        #expect(configuration.client.openVolumeTimeout == .seconds(180))
        #expect(configuration.client.connType == .tcp)
        #expect(configuration.nbd.listen == nil)
        #expect(configuration.nbd.maxConnections == 64)
        #expect(configuration.pools.isEmpty)
        #expect(configuration.warnings == [])
        #expect(configuration.file == "qbd.conf")
    }

    @Test("The file that the public CSI driver installs is understood without a warning")
    func driverFile() throws {
        let configuration = try configuration(
            """
            # a licence
            [zookeeper]
            # IP of zookeeper cluster
            ip="172.31.30.12:2181"
            cluster_name="cluster1"

            [client]
            tcp_no_delay=1
            io_depth=64
            io_timeout=30
            conn_timeout=8
            open_volume_timeout=180
            """)
        #expect(configuration.zookeeper.ip == ["172.31.30.12:2181"])
        #expect(configuration.zookeeper.clusterName == "cluster1")
        #expect(configuration.warnings == [])
    }

    @Test("PureFlash's pf.conf is readable, and what is not ours in it is a warning")
    func pureFlashFile() throws {
        let configuration = try configuration(
            """
            [cluster]
            name=cluster1
            [zookeeper]
            ip=127.0.0.1:2181
            [conductor]
            mngt_ip=127.0.0.1
            [db]
            ip=127.0.0.1
            pass="x"y
            [tray.0]
               dev = /dev/loop0     # path of a flash device
            no setting at all
            [client]
            conn_type=rdma
            """)
        #expect(configuration.zookeeper.ip == ["127.0.0.1:2181"])
        #expect(configuration.zookeeper.clusterName == "cluster1")
        #expect(configuration.client.connType == .rdma)
        #expect(
            configuration.warnings == [
                "qbd.conf:6: unknown key 'mngt_ip' in section [conductor] is ignored",
                "qbd.conf:7: unknown section [db] is ignored",
                "qbd.conf:10: unknown section [tray.0] is ignored",
            ])
    }

    @Test("Every key of [client] is taken")
    func client() throws {
        let configuration = try configuration(
            """
            [client]
            tcp_no_delay = 0
            io_depth = 255
            connections_per_store = 8
            io_timeout = 1
            conn_timeout = 86400
            open_volume_timeout = 2
            conn_type = rdma
            """)
        #expect(!configuration.client.tcpNoDelay)
        #expect(configuration.client.ioDepth == 255)
        #expect(configuration.client.connectionsPerStore == 8)
        #expect(configuration.client.ioTimeout == .seconds(1))
        #expect(configuration.client.connTimeout == .seconds(86_400))
        #expect(configuration.client.openVolumeTimeout == .seconds(2))
        #expect(configuration.client.connType == .rdma)
    }

    @Test("Where the data port is not the usual one, that of a store's HTTP is not known")
    func storePorts() throws {
        let data = try configuration("[client]\nstore_port = 5000")
        #expect(data.client.storePort == 5000 && data.client.storeHTTPPort == nil)
        let both = try configuration("[client]\nstore_http_port = 5001\nstore_port = 5000\nstore_grace = 9")
        #expect(both.client.storePort == 5000 && both.client.storeHTTPPort == 5001)
        #expect(both.client.storeGrace == .seconds(9))
        #expect(try configuration("[client]\nstore_port = 49162").client.storeHTTPPort == 49181)
    }

    @Test("A switch is written 1, true, yes or on, and 0, false, no or off")
    func flags() throws {
        for (text, value) in [
            ("1", true), ("true", true), ("yes", true), ("on", true),
            ("0", false), ("false", false), ("no", false), ("off", false),
        ] {
            #expect(try configuration("[client]\ntcp_no_delay=\(text)").client.tcpNoDelay == value)
        }
    }

    @Test("Addresses are separated by commas, with blanks around them allowed")
    func lists() throws {
        let configuration = try configuration(
            """
            [zookeeper]
            ip = "192.0.2.1:2181 , zk-2.example.org:2182,[2001:db8::3]:2183"
            [conductor]
            endpoints = 192.0.2.1, [2001:db8::2], host:8080
            """)
        #expect(configuration.zookeeper.ip == ["192.0.2.1:2181", "zk-2.example.org:2182", "[2001:db8::3]:2183"])
        #expect(configuration.conductor.endpoints == ["192.0.2.1:49180", "[2001:db8::2]:49180", "host:8080"])
    }

    @Test("[nbd] listen is an address or nothing")
    func listen() throws {
        #expect(try configuration("[nbd]\nlisten = [::1]:10809").nbd.listen?.host == "::1")
        #expect(try configuration("[nbd]\nlisten = 0.0.0.0:0").nbd.listen?.port == 0)
        #expect(try configuration("[nbd]\nlisten =").nbd.listen == nil)
        #expect(try configuration("[nbd]\nlisten = \"\"  # none").nbd.listen == nil)
        #expect(try configuration("[nbd]\nmax_connections = 1024").nbd.maxConnections == 1024)
    }

    @Test("[cluster] name stands in for a missing cluster_name, wherever it is in the file")
    func clusterName() throws {
        #expect(try configuration("[cluster]\nname=a").zookeeper.clusterName == "a")
        let sections = ["[cluster]\nname=a\n", "[zookeeper]\ncluster_name=b\n"]
        for text in [sections, sections.reversed()] {
            let configuration = try configuration(text.joined())
            #expect(configuration.zookeeper.clusterName == "b")
            #expect(configuration.warnings.count == 1)
            #expect(
                configuration.warnings.first?.hasSuffix(
                    "key 'name' in section [cluster] is ignored: cluster_name in section [zookeeper] says otherwise")
                    == true)
        }
        #expect(try configuration("[cluster]\nname=a\n[zookeeper]\ncluster_name=a").warnings == [])
    }

    @Test("The later of two equal keys counts, with a warning")
    func duplicateKey() throws {
        let configuration = try configuration("[client]\nio_depth=1\n[nbd]\n[client]\n\nio_depth=2\nio_depth=3")
        #expect(configuration.client.ioDepth == 3)
        #expect(
            configuration.warnings == [
                "qbd.conf:6: key 'io_depth' in section [client] was set in line 2 already; this one counts",
                "qbd.conf:7: key 'io_depth' in section [client] was set in line 6 already; this one counts",
            ])
    }

    @Test("Equal keys in different sections are different keys")
    func sameKeyElsewhere() throws {
        let configuration = try configuration("[pool.a]\ntype=memory\n[pool.b]\ntype=memory\n[tray.0]\ntype=x")
        #expect(configuration.warnings == ["qbd.conf:5: unknown section [tray.0] is ignored"])
    }

    @Test("What is unknown is ignored with a warning that names file and line")
    func unknown() throws {
        let configuration = try configuration(
            """
            io_depth = 3
            [client]
            IO_DEPTH = 4
            io_dept = "5"
            [Client]
            io_depth = 6
            [pool]
            [pool.x]
            type = memory
            size = 10G
            """)
        #expect(configuration.client.ioDepth == 64)
        #expect(
            configuration.warnings == [
                "qbd.conf:1: key 'io_depth' stands before the first [section] and is ignored",
                "qbd.conf:3: unknown key 'IO_DEPTH' in section [client] is ignored",
                "qbd.conf:4: unknown key 'io_dept' in section [client] is ignored",
                "qbd.conf:5: unknown section [Client] is ignored",
                "qbd.conf:7: unknown section [pool] is ignored",
                "qbd.conf:10: unknown key 'size' in section [pool.x] is ignored",
            ])
    }

    @Test("A flood of warnings is counted, not kept")
    func warningFlood() throws {
        let configuration = try configuration("[client]\n" + String(repeating: "x=1\n", count: 1000))
        #expect(configuration.warnings.count == 101)
        #expect(configuration.warnings.last == "qbd.conf: 900 more warnings are not shown")
    }

    @Test(
        "A bad value is an error that names file, line, key, value, and what is right",
        arguments: [
            ("client", "io_depth=0", "'io_depth' is '0'; it must be a whole number from 1 to 255"),
            ("client", "io_depth=256", "'io_depth' is '256'; it must be a whole number from 1 to 255"),
            ("client", "io_depth=-1", "'io_depth' is '-1'; it must be a whole number from 1 to 255"),
            ("client", "io_depth=6.4", "'io_depth' is '6.4'; it must be a whole number from 1 to 255"),
            ("client", "io_depth=64k", "'io_depth' is '64k'; it must be a whole number from 1 to 255"),
            (
                "client", "io_depth=99999999999999999999",
                "'io_depth' is '99999999999999999999'; it must be a whole number from 1 to 255"
            ),
            (
                "client", "io_depth=",
                "'io_depth' has no value; write io_depth = VALUE, or remove the line for the default"
            ),
            ("client", "io_timeout=0", "'io_timeout' is '0'; it must be a whole number of seconds from 1 to 86400"),
            ("client", "io_timeout=30s", "'io_timeout' is '30s'; it must be a whole number of seconds from 1 to 86400"),
            (
                "client", "conn_timeout=86401",
                "'conn_timeout' is '86401'; it must be a whole number of seconds from 1 to 86400"
            ),
            (
                "client", "open_volume_timeout=x",
                "'open_volume_timeout' is 'x'; it must be a whole number of seconds from 1 to 86400"
            ),
            ("client", "tcp_no_delay=2", "'tcp_no_delay' is '2'; it must be 1 or 0"),
            (
                "client", "connections_per_store=9",
                "'connections_per_store' is '9'; it must be a whole number from 1 to 8"
            ),
            ("client", "conn_type=RDMA", "'conn_type' is 'RDMA'; it must be tcp or rdma"),
            ("nbd", "max_connections=0", "'max_connections' is '0'; it must be a whole number from 1 to 1024"),
            ("nbd", "listen=10809", "'listen': '10809' has no port; write host:port or [IPv6 address]:port"),
            ("zookeeper", "ip=host", "'ip': 'host' has no port; write host:port or [IPv6 address]:port"),
            ("zookeeper", "ip=a:1,,b:1", "'ip': an address is empty; write host:port or [IPv6 address]:port"),
            ("zookeeper", "ip=a:1,", "'ip': an address is empty; write host:port or [IPv6 address]:port"),
            (
                "zookeeper", "ip=a:0",
                "'ip': 'a:0' has '0' where its port should be; a port is a number from 1 to 65535"
            ),
            (
                "zookeeper", "cluster_name=a/b",
                "'cluster_name' is 'a/b'; the name of a cluster holds no '/' and is neither '.' nor '..'"
            ),
            ("cluster", "name=..", "'name' is '..'; the name of a cluster holds no '/' and is neither '.' nor '..'"),
            (
                "conductor", "endpoints=\"\"",
                "'endpoints' has no value; write endpoints = VALUE, or remove the line for the default"
            ),
            ("pool.a", "type=file", "'type' is 'file'; it must be local or memory"),
            ("pool.a", "path=relative", "'path' is 'relative'; it must be an absolute path, one that starts with /"),
            ("pool.a", "path=/./", "'path' is '/./'; give the pool a directory of its own"),
        ])
    func badValue(section: String, setting: String, message: String) {
        #expect(fault(in: "# first\n[\(section)]\n\(setting)\n") == "qbd.conf:3: \(message)")
    }

    @Test("An error has file, line and message as separate fields too")
    func errorFields() throws {
        let error = try #require(
            #expect(throws: ConfigurationError.self) { try configuration("[client]\n\nio_depth=x\n") })
        #expect(error.file == "qbd.conf")
        #expect(error.line == 3)
        #expect(error.message == "'io_depth' is 'x'; it must be a whole number from 1 to 255")
        #expect(error.systemError == nil)
    }
}
