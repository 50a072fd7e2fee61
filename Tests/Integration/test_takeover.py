"""A daemon takes over what the one before had mapped, side by side, and waits for what is not there yet."""

import shutil
import signal
import subprocess
import threading
import time

import nbd
import pytest
from harness import MiB, SANITIZER, SLOWNESS, run, wait_for
from test_pureflash import cluster, connected, stand_still

VOLUMES = [f"disk/v{number}" for number in range(4)]


def readable(daemon, volume):
    return run(["qemu-io", "-f", "raw", "-c", "read -P 7 0 64k", daemon.uri(volume)]).status == 0


def with_a_local_pool(daemon):
    daemon.config.write_text(daemon.config.read_text() + f"[pool.here]\ntype=local\npath={daemon.pool_path}\n")


def numbers(daemon):
    return {one["volume"]: one["dev_id"] for one in daemon.json("list")}


@pytest.mark.deadline(150)
def test_a_cluster_that_is_away_holds_up_nobody():
    """Its volumes wait for it and come back by themselves; a local one is there at once, and SIGTERM is obeyed."""
    with cluster() as (daemon, (store,)):
        with_a_local_pool(daemon)
        for volume in [*VOLUMES, "here/a"]:
            daemon.qbd("create", volume, "-k", "64M").succeeded()
            run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", daemon.map(volume)]).succeeded()
        daemon.qbd("throttle", VOLUMES[0], "-t", "read_iops=1000").succeeded()
        before = numbers(daemon)
        documents = {path: path.read_text() for path in daemon.state.glob("*.mapping")}
        daemon.kill()
        # It takes connections, and answers nothing.
        stand_still(store.process)
        started = time.monotonic()
        daemon.start()
        # One after the other they would take 12 s, a try of each.
        assert time.monotonic() - started < 9 * SLOWNESS
        assert readable(daemon, "here/a")
        assert numbers(daemon) == before
        waiting = daemon.json("info", VOLUMES[0])
        assert waiting["health"] == "reconnecting" and "not taken over" in waiting["waits"]
        assert waiting["read_iops"] == 1000 and waiting["state"] == "normal"
        text = daemon.qbd("info", VOLUMES[0]).succeeded().out
        assert "not taken over" in text

        # What others may do meanwhile.
        for words in (["delete", VOLUMES[1]], ["create", VOLUMES[1], "-k", "64M"], ["suspend", VOLUMES[1]],
                      ["resize", VOLUMES[1], "-k", "1G"], ["throttle", VOLUMES[1], "-t", "read_iops=1"]):  # fmt: skip
            daemon.qbd(*words).failed(16, VOLUMES[1], "not taken over", f"qbd unmap {VOLUMES[1]}")
        daemon.qbd("map", "--export", "--read-only", VOLUMES[1]).failed(17, VOLUMES[1], "writable")
        daemon.qbd("map", "--export", VOLUMES[1]).failed(110, "did not answer")
        daemon.create("here/b", MiB)
        daemon.map("here/b")
        assert numbers(daemon) == {**before, "here/b": 5}
        daemon.qbd("unmap", "here/b").succeeded()
        assert {path: path.read_text() for path in daemon.state.glob("*.mapping")} == documents
        daemon.qbd("unmap", VOLUMES[3]).succeeded()
        daemon.qbd("unmap", VOLUMES[3]).failed(25, VOLUMES[3])

        daemon.stop()
        daemon.start()
        store.process.send_signal(signal.SIGCONT)
        for volume in VOLUMES[:3]:
            wait_for(lambda: readable(daemon, volume), f"{volume} is taken over", 30)
        assert numbers(daemon) == {name: number for name, number in before.items() if name != VOLUMES[3]}
        assert daemon.json("info", VOLUMES[0])["health"] != "reconnecting"
        assert daemon.json("info", VOLUMES[0])["read_iops"] == 1000
        daemon.map(VOLUMES[3])
        assert numbers(daemon) == before


def test_map_takes_over_what_waits():
    with cluster(open_volume_timeout=30) as (daemon, (store,)):
        daemon.qbd("create", "disk/a", "-k", "64M").succeeded()
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", daemon.map("disk/a")]).succeeded()
        daemon.qbd("resume", "disk/a", "-t", "error").succeeded()
        daemon.kill()
        store.kill()
        daemon.start()
        results = []
        asking = threading.Thread(target=lambda: results.append(daemon.qbd("map", "--export", "disk/a", timeout=60)))
        asking.start()
        store.start()
        asking.join()
        results[0].succeeded()
        # As the last daemon left it.
        assert daemon.json("info", "disk/a")["state"] == "error"
        handle = connected(daemon.uri("disk/a"))
        with pytest.raises(nbd.Error):
            handle.pread(512, 0)
        handle.shutdown()


def test_an_export_whose_volume_is_another_one_is_mapped_anew(daemon):
    """Nobody waits for it: the next who asks gets the volume there is."""
    daemon.volume("disk/a", MiB)
    daemon.stop()
    shutil.rmtree(daemon.pool_path)
    daemon.pool_path.mkdir()
    daemon.start()
    assert numbers(daemon) == {} and "disk/a" in daemon.log()
    daemon.qbd("info", "disk/a").failed(25, "disk/a")
    daemon.create("disk/other", MiB)
    daemon.create("disk/a", 2 * MiB)
    daemon.map("disk/a")
    assert daemon.json("info", "disk/a")["size"] == 2 * MiB
    daemon.kill()
    daemon.start()
    assert daemon.json("info", "disk/a")["size"] == 2 * MiB
    daemon.qbd("unmap", "disk/a").succeeded()
    daemon.qbd("delete", "disk/a").succeeded()


@pytest.mark.skipif(
    shutil.which("strace") is None or SANITIZER is not None, reason="strace is missing, or a sanitizer traces itself"
)
@pytest.mark.deadline(90)
def test_a_volume_whose_disk_is_slow_to_synchronize_holds_up_no_other(daemon):
    uri = daemon.volume("disk/a", 16 * MiB)
    daemon.create("disk/b", MiB)
    daemon.qbd("snapshot", "create", "disk/a@one").succeeded()
    run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", uri]).succeeded()
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.pid), "-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=2000000",
         "-o", "/dev/null"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "attached" in tracer.stderr.readline()
        making = threading.Thread(target=lambda: daemon.qbd("snapshot", "create", "disk/a@two").succeeded())
        making.start()
        cycles = 0
        while making.is_alive():
            daemon.map("disk/b")
            daemon.qbd("snapshot", "list", "disk/b").succeeded()
            daemon.qbd("unmap", "disk/b").succeeded()
            cycles += making.is_alive()
        assert cycles >= 5, "another volume should be mapped and unmapped meanwhile"
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


def test_names_that_are_no_pools_cost_no_memory():
    """With a cluster configured, any name may be a pool's."""
    with cluster() as (daemon, (store,)):
        store.kill()

        def ask(first, count):
            for number in range(first, first + count):
                status, _ = daemon.post("QBD_IOC_LIST_POOL", pool=f"pool{number}", config=str(daemon.config))
                assert status != 200

        ask(0, 500)
        before = daemon.resident()
        ask(500, 3000)
        assert daemon.resident() - before < (24 if SANITIZER else 2) * MiB
