"""The guest's kernel and its first file system, made from Debian's packages without installing any kernel here."""

import lzma
import os
import pathlib
import re
import shutil
import subprocess

# What the guest needs until it has its root; everything else it loads from there with modprobe.
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")


class Unable(Exception):
    """The VM cannot be built; the text says why and what to do."""


class Kernel:
    """A kernel image and its modules: `root`/boot/vmlinuz-`version` and `root`/lib/modules/`version`."""

    def __init__(self, root):
        images = sorted(root.glob("boot/vmlinuz-*"), key=_natural)
        images = [image for image in images if (root / "lib/modules" / _version(image)).is_dir()]
        if not images:
            raise Unable(f"{root} has no kernel with its modules: boot/vmlinuz-VERSION and lib/modules/VERSION")
        self.image = images[-1]
        self.version = _version(self.image)
        self.modules = root / "lib/modules" / self.version
        self.base = root
        self._dependencies = None

    def resolve(self, names):
        """The files of these modules and of what they depend on, in the order to load them; built-in ones left out."""
        if self._dependencies is None:
            listing = self.modules / "modules.dep"
            if not listing.exists():
                _run("depmod", "-b", self.base, self.version)
            self._dependencies = {}
            for line in listing.read_text().splitlines():
                path, _, needs = line.partition(":")
                self._dependencies[_module(path)] = (path, needs.split())
            for path in (self.modules / "modules.builtin").read_text().split():
                self._dependencies.setdefault(_module(path), (None, []))
        ordered = []
        for name in names:
            if _module(name) not in self._dependencies:
                raise Unable(f"kernel {self.version} has no module {name}")
            path, needs = self._dependencies[_module(name)]
            # modules.dep has what is needed first last.
            for file in [*reversed(needs), path]:
                if file and file not in ordered:
                    ordered.append(file)
        return [self.modules / file for file in ordered]


def find(cache):
    """The kernel of QBD_VM_KERNEL, a directory with boot and lib/modules, or else Debian's, downloaded to `cache`.

    QBD_VM_PACKAGE names another package than linux-image-amd64, such as linux-image-6.12-amd64.
    """
    chosen = os.environ.get("QBD_VM_KERNEL")
    if chosen:
        return Kernel(pathlib.Path(chosen).resolve())
    package = os.environ.get("QBD_VM_PACKAGE", "linux-image-amd64")
    root = cache / package
    if not root.is_dir():
        _download(package, cache, root)
    return Kernel(root)


def find_udev(cache):
    """Where Debian's package udev is unpacked, or None when it is installed: a host without devices has none."""
    if os.path.exists("/lib/systemd/systemd-udevd"):
        return None
    root = cache / "udev"
    if not root.is_dir():
        _unpack("udev", cache, root)
    return root


def _download(package, cache, root):
    """Unpacks what the package stands for. Installing it would build an initrd, and call grub."""
    depends = _run("apt-cache", "depends", "--no-recommends", package)
    found = re.search(r"Depends: (linux-image-\d\S*)", depends)
    if not found:
        raise Unable(f"apt knows no package {package}: run apt-get update, or set QBD_VM_KERNEL to a directory\n"
                     "that has boot/vmlinuz-VERSION and lib/modules/VERSION")  # fmt: skip
    _unpack(found[1], cache, root)


def _unpack(name, cache, root):
    """Downloads a Debian package and unpacks it into `root`."""
    print(f"downloading {name} for the VM", flush=True)
    partial = cache / f"{root.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _run("apt-get", "-q", "download", name, cwd=partial)
    package = next(partial.glob("*.deb"))
    _run("dpkg", "-x", package, partial)
    package.unlink()
    partial.rename(root)


def build_initramfs(kernel, init, path):
    """Writes the cpio archive with busybox, `init`, and the boot modules as /modules/NN-name.ko."""
    stage = path.with_suffix(".stage")
    shutil.rmtree(stage, ignore_errors=True)
    for directory in ("bin", "modules", "dev", "proc", "sys", "lower", "upper", "root"):
        (stage / directory).mkdir(parents=True)
    busybox = shutil.which("busybox")
    if not busybox:
        raise Unable("busybox is missing: install busybox-static")
    shutil.copy(busybox, stage / "bin/busybox")
    shutil.copy(init, stage / "init")
    (stage / "init").chmod(0o755)
    for number, module in enumerate(kernel.resolve(BOOT_MODULES)):
        name = module.name.split(".ko")[0]
        (stage / "modules" / f"{number:02}-{name}.ko").write_bytes(_uncompressed(module))
    archive(stage, path)
    shutil.rmtree(stage)


def archive(directory, path):
    """Makes a cpio archive, as the kernel wants it, of a directory's content. The kernel reads several in a row."""
    names = b"".join(bytes(file.relative_to(directory)) + b"\0" for file in sorted(directory.rglob("*")))
    with open(path, "wb") as out:
        command = ["cpio", "--quiet", "-0", "-o", "-H", "newc", "-R", "0:0"]
        subprocess.run(command, input=names, stdout=out, cwd=directory, check=True)


def _uncompressed(module):
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", module], stdout=subprocess.PIPE, check=True).stdout
    return module.read_bytes()


def _module(path):
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def _version(image):
    return image.name.removeprefix("vmlinuz-")


def _natural(image):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", image.name)]


def _run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise Unable(f"{' '.join(str(word) for word in command)} failed:\n{done.stdout}")
    return done.stdout
