"""The image that cases of people's real work run."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile

_PYTHON_MODULES = ("_ctypes", "_posixsubprocess", "_sqlite3", "mmap", "fcntl", "resource", "termios")


def image(*, python: bool) -> bytes:
    """A root file system as a tar archive: this machine's static busybox, and its Python with what that loads."""
    applets = subprocess.run(
        ["/bin/busybox", "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for directory, mode in (("bin", 0o755), ("tmp", 0o1777), ("usr", 0o755), ("etc", 0o755)):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        tar.add("/bin/busybox", arcname="bin/busybox")
        for name in set(applets) - {"busybox"}:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        if python:
            tar.dereference = True  # the machine's links lead over others (/lib, /lib64)
            for path in sorted(_python_files()):
                tar.add(path, arcname=path.lstrip("/"), recursive=False)
    return out.getvalue()


def _python_files() -> set[str]:
    """The files of Debian's Python: its program, library and the shared objects that they load."""
    ask = "import sys, sysconfig; print(sys.executable, sysconfig.get_path('stdlib'))"
    program, library = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", ask], capture_output=True, text=True, check=True
    ).stdout.split()
    files = {os.path.realpath(program)}
    for top, directories, names in os.walk(library):
        directories[:] = [name for name in directories if name not in ("__pycache__", "test", "idlelib")]
        files.update(os.path.join(top, name) for name in names)
    objects = [path for path in files if any(f"/{name}." in path for name in _PYTHON_MODULES)]
    said = subprocess.run(
        ["ldd", os.path.realpath(program), *objects], capture_output=True, text=True, check=True
    ).stdout
    shared = set(re.findall(r"(/\S+\.so\S*) \(", said))
    return {"/usr/bin/python3", *files, *shared}
