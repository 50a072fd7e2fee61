import Control

/// The texts about the command as a whole, for 80 columns. The help of a verb is made from its options.
enum Help {
    /// Under a complaint that belongs to no verb.
    static let summary = """
        usage: qbd VERB [OPTIONS]   (map, unmap, list, info, create, delete, ...)
               qbd -m|-u|-r|-l|-M|-U|-s|-S|-R|-i|-z|-v|-h ...
        'qbd help' lists the verbs
        """

    static let overview = """
        qbd \(ProductVersion.string) - maps block volumes to local disks; qbdd(8) does the work

        usage: qbd VERB [OPTIONS]

          create POOL/VOLUME -k SIZE     create a volume; SIZE as in 512M, 10G
          delete POOL/VOLUME             delete a volume and its data
          resize POOL/VOLUME -k SIZE     grow it, and its device if it is mapped
          snapshot create|delete|rollback POOL/VOLUME@SNAPSHOT
          snapshot list POOL/VOLUME      list its snapshots; they are mapped read-only
          clone POOL/VOLUME@SNAPSHOT POOL/NEW   make a volume of a snapshot
          volumes [POOL]                 list the volumes of a pool, or of all pools
          map POOL/VOLUME                make it the device /dev/qbdN
          map POOL/VOLUME --export       serve it over NBD instead, and print its URI
          unmap POOL/VOLUME              end that
          map-all, unmap-all             map and unmap what /etc/neonsan/map.conf lists
          remap POOL/VOLUME              give its device fresh connections
          throttle POOL/VOLUME -t LIMITS limit its I/O, as in read_bps=10M,iops=0
          suspend POOL/VOLUME            hold back its I/O
          resume POOL/VOLUME -t MODE     let it go on, fail or be lost
          list                           list what is mapped
          info POOL/VOLUME               state, clients, counters and latency
          version                        versions of the command and the daemon
          help [VERB [ACTION]]           this text, or the usage of a verb

        In a later version: rdma:// names. They say so with exit status 95.

        The same in letters, where VOLUME is [tcp://|rdma://]POOL/VOLUME:

          -m|--map VOLUME                -s|--setthrottle VOLUME -t KEY=NUMBER[,...]
          -u|--unmap VOLUME              -S|--suspend VOLUME
          -r|--remap VOLUME              -R|--resume VOLUME -t normal|error|discard
          -l|--list                      -i|--info VOLUME
          -M|--mapall [-f FILE]          -z|--resize VOLUME -k SIZE
          -U|--unmapall [-f FILE]        -v|--version   -h|--help

        Options:
          -c, --config CONFIG   the configuration ($QBD_CONFIG, /etc/neonsan/qbd.conf)
          -V, --verbose         say more, on stderr
          --json                print JSON
          --socket PATH         where qbdd listens ($QBD_SOCKET, /run/qbd/qbdctl.sock)
          --timeout SECONDS     give up after this time (200)

        Exit status: 0, 64 for wrong usage, else an errno: 2 no such volume, 16 in
        use, 22 invalid, 25 not mapped, 95 later version, 111 qbdd is not running.
        qbd(8) says more.

        """
}
