"""The writable layer of a container, and its volumes on disks: a sparse file with an ext4 file system in it.

mkfs.ext4 runs once per size; its result is kept as a template of about 60 KB of data (in ``$KATA_CACHE_DIR/ext4``). A
new layer is made by copying just this data into a file of the right size, which takes a millisecond and no process.

The choices, for a disk that lives as long as its container and must survive the VM being killed:

* A journal of 16 MiB at most: without one, a VM that was killed would need a file system check first.
* Nothing is left to be initialised in the guest: the file is all holes, so mkfs may mark the inode tables as
  zeroed (it does because discarding zeroes a file) and need not write the journal. Otherwise the guest's
  kernel would begin by writing zeros, which take real space, for seconds.
* No blocks reserved for root, no room for growing, one superblock: metadata stay together at the front.
* The two directories that an overlay needs (`OVERLAY_DIRECTORIES`) are there: making them is the guest's first
  transaction otherwise, ten milliseconds for an emulated one. (A volume has them, too, and no use for them: so the
  template serves both.)

A *scratch* disk does not outlive its machine, so it has no checksums, which an emulated guest computes for each inode
that it touches. It has a journal all the same, the smallest: without one ext4 gives no inode out again for a minute
after its file has gone, and passes over all of these anew for each new file (``recently_deleted``, fs/ext4/ialloc.c;
``findings/``). In a guest with Linux 6.12 a second unpacking of 5 000 files took 27 to 36 s instead of 5.
"""

from __future__ import annotations

import errno
import os

from kata import paths
from kata.errors import HostError, ResourceExhaustedError, UsageError

OVERLAY_DIRECTORIES = ("fs", "work")
MIN_SIZE = 16 << 20
MAX_SIZE = 16 << 40
_VERSION = 3
"""Raised when the options below change: templates of other versions are not used."""
_MOST_TEMPLATES = 64
"""Templates to keep: one for each size that is in use."""

_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super2,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
"""All features are named, and the host's mke2fs.conf is ignored: a guest's kernel may be older than those tools."""


_SCRATCH_FEATURES = _FEATURES.replace("metadata_csum", "uninit_bg")


def make_writable(
    path: str,
    size_bytes: int,
    what: str = "writable layer",
    option: str = "--storage-size",
    *,
    scratch: bool = False,
    directories: bool = True,
) -> None:
    """Make a writable layer, or a volume.

    Args:
        path: The file to make; it must not exist.
        size_bytes: Size of the file system, rounded down to 4 KiB. The file is sparse.
        what: Its name in errors.
        option: The option that sets its size.
        scratch: It does not outlive its machine.
        directories: It has `OVERLAY_DIRECTORIES`; otherwise the guest makes them, as those of the layer below.

    Raises:
        UsageError: The size is out of range.
        ResourceExhaustedError: No space on the host's disk, or its file system takes no file of that size.
        HostError: mkfs.ext4 is missing or failed, or the file cannot be written.
    """
    size = check_size(size_bytes, what, option)
    try:
        template = _open_template(size, scratch=scratch, directories=directories)
    except OSError as error:
        raise _host_error(error, f"{what} {paths.cache_dir()}", option) from error
    try:
        _copy(template, path, size)
    except OSError as error:
        raise _host_error(error, f"{what} {path}", option) from error
    finally:
        os.close(template)


def check_size(size_bytes: int, what: str = "writable layer", option: str = "--storage-size") -> int:
    """Round the size of a file system down to 4 KiB.

    Args:
        size_bytes: As it was asked for.
        what: Its name in errors.
        option: The option that sets it.

    Raises:
        UsageError: It is out of range.
    """
    size = size_bytes & ~4095
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(
            f"{option}: a {what} of {size_bytes} bytes cannot be made",
            f"choose between {MIN_SIZE >> 20}m and 16t",
        )
    return size


def _open_template(size: int, *, scratch: bool, directories: bool) -> int:
    kind = ("-scratch" if scratch else "") + ("" if directories else "-empty")
    path = os.path.join(_directory(), f"v{_VERSION}-{size}{kind}.img")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        _make_template(path, size, scratch=scratch, directories=directories)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(fd).st_size != size:
        os.close(fd)
        raise HostError(f"the template {path} is damaged", f"rm {path}")
    return fd


def clear_leftovers() -> list[str]:
    """Remove leftovers of killed processes from the templates' directory.

    Returns:
        The paths of what was removed.
    """
    try:
        lock = _lock(_directory())
    except OSError:
        return []  # there is none
    try:
        return _sweep()
    finally:
        os.close(lock)


def _directory() -> str:
    return os.path.join(paths.cache_dir(), "ext4")


def _lock(directory: str) -> int:
    """Wait until no other process makes a template. Closing the returned descriptor releases the lock."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sweep() -> list[str]:
    """Remove everything but templates, and the least recently used ones of these. The caller holds the lock."""
    import shutil

    removed, templates = [], []
    with os.scandir(_directory()) as entries:
        for entry in entries:
            if entry.name.startswith(f"v{_VERSION}-") and entry.name.endswith(".img"):
                templates.append((entry.stat().st_atime_ns, entry.path))
                continue
            removed.append(entry.path)
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
    for _, path in sorted(templates)[:-_MOST_TEMPLATES]:
        os.unlink(path)
    return removed


def _make_template(path: str, size: int, *, scratch: bool, directories: bool) -> None:
    """Make the template under a temporary name first, so that no process copies an incomplete one."""
    paths.make_dirs(os.path.dirname(path), 0o700)
    lock = _lock(os.path.dirname(path))
    try:
        _sweep()
        if not os.path.exists(path):  # otherwise another process has made it meanwhile
            _make_locked(path, size, scratch=scratch, directories=directories)
    finally:
        os.close(lock)


def _make_locked(path: str, size: int, *, scratch: bool, directories: bool) -> None:
    import shutil
    import subprocess
    import tempfile

    temporary = f"{path}.{os.getpid()}.tmp"
    content = tempfile.mkdtemp(prefix="ext4-", dir=os.path.dirname(path))
    command = [
        "mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-L", "kata-upper",
        "-i", "4096" if size < 512 << 20 else "16384",
        "-O", _SCRATCH_FEATURES if scratch else _FEATURES,
        "-E", "packed_meta_blocks=1,num_backup_sb=0,lazy_journal_init=1,discard,root_owner=0:0",
        "-J", "size=4" if scratch or size < 128 << 20 else "size=16",
        "-d", content,
        temporary,
    ]  # fmt: skip
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C", "MKE2FS_CONFIG": "/dev/null"}
    try:
        os.chmod(content, 0o755)  # the root directory's mode is taken over
        for name in OVERLAY_DIRECTORIES if directories else ():
            os.mkdir(f"{content}/{name}")
            os.chmod(f"{content}/{name}", 0o755)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            run = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            if run.returncode != 0:
                mkfs_output = (
                    run.stdout.decode("utf-8", "backslashreplace").strip().replace("\n", "; ")[:500]
                )
                if "No space left" in mkfs_output:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), temporary)
                raise HostError(
                    f"mkfs.ext4 failed with status {run.returncode}: {mkfs_output}",
                    "check the disk and e2fsprogs",
                )
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except FileNotFoundError as error:
        if error.filename == "mkfs.ext4":
            raise HostError("mkfs.ext4 is not installed", "apt-get install e2fsprogs") from None
        raise
    finally:
        shutil.rmtree(content, ignore_errors=True)
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass


def _copy(template: int, path: str, size: int) -> None:
    """Copy the parts of the template that hold data. On an error nothing is left behind."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        at = 0
        while (at := _next_data(template, at)) >= 0:
            end = os.lseek(template, at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(template, min(end - at, 1 << 20), at)
                if not data:
                    raise OSError(errno.EIO, "the template ends early", path)
                at += os.pwrite(fd, data, at)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _next_data(fd: int, at: int) -> int:
    """The offset at which the next data begins, at or after *at*; -1 if there is none."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise


def _host_error(error: OSError, what: str, option: str) -> HostError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError(
            f"the {what} cannot be made: {reason}",
            f"free some space (`kata rm`, `kata rmi`, `kata gc`); KATA_STATE_DIR moves {paths.state_dir()}",
        )
    if error.errno == errno.EFBIG:
        return ResourceExhaustedError(f"the {what} cannot be made: {reason}", f"choose a smaller {option}")
    return HostError(f"the {what} cannot be made: {reason}", "check the directory and its permissions")
