"""What people's real work asks of a container: each case with runc and with kata, and what came out.

The cases are from bug reports and from workloads that broke on machines like ours. A case is a function that takes a
`Box`, does what a person would do there, and returns what that person would see, without what differs from one time to
the next. `EXPECTED` has what is right; where kata cannot do that, `LIMITS` says what it does instead, and why.

The table goes into docs/clients.md. Its last column is written by a run inside the KVM lab.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from containerd_support import ROOT
from test_docker import PROGRAMS
from test_docker import Docker as Dockerd
from waiting import PATIENCE, until

RUNTIMES = {"runc": "runc", "kata": "io.containerd.kata.v2"}
COLUMNS = ("runc", "kata, emulation", "kata, KVM")
BEGIN, END = "<!-- written by tools/conformance -->", "<!-- up to here -->"
_PYTHON_MODULES = ("_ctypes", "_posixsubprocess", "_sqlite3", "mmap", "fcntl", "resource", "termios")


class Box:
    """Docker with one of the runtimes.

    Args:
        docker: The daemon.
        runtime: A key of `RUNTIMES`.
        directory: For what cases share with containers; empty.
    """

    def __init__(self, docker: Dockerd, runtime: str, directory: Path) -> None:
        self.docker = docker
        self.runtime = runtime
        self.directory = directory
        self._count = 0

    def run(
        self, *arguments: str, image: str = "py", options: tuple[str, ...] = (), stdin: bytes = b""
    ) -> str:
        """Run a container to its end.

        Returns:
            Output, errors and exit status, as ``out; err; status n``.
        """
        return self.call(
            "run", "--rm", "--runtime", RUNTIMES[self.runtime], *options, image, *arguments, stdin=stdin
        )

    def call(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run the client; as `run` returns it."""
        return self._done(["docker", *arguments], stdin)

    def _done(self, command: list[str], stdin: bytes) -> str:
        done = subprocess.run(
            command,
            input=stdin,
            env=self.docker.env,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        said = [stream.decode(errors="replace").strip() for stream in (done.stdout, done.stderr)]
        # That the machine is emulated is said once, whatever the case; and dockerd says what a host's cgroups lack.
        said[1] = re.sub(
            r"^(note: using software emulation|WARNING: Your kernel).*$", "", said[1], flags=re.MULTILINE
        ).strip()
        return "; ".join([*(text for text in said if text), f"status {done.returncode}"])

    @contextmanager
    def running(self, *command: str, image: str = "py", options: tuple[str, ...] = ()) -> Iterator[str]:
        """A container that runs a command (`sleep` without one); its name."""
        self._count += 1
        name = f"w{os.getpid()}-{self.runtime}-{self._count}"
        given = command or ("sleep", "1000")
        try:
            self.docker(
                "run", "-d", "--runtime", RUNTIMES[self.runtime], "--name", name, *options, image, *given
            )
            yield name
        finally:
            self.docker("rm", "-f", name, code=None)

    def exec(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """Run a command in a container; as `run` returns it."""
        return self.call("exec", *options, name, *command)

    def fresh(self) -> Path:
        """A new empty directory on the host."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def words(self, *arguments: str) -> str:
        """A command line for a shell: Docker's with runc, with kata that of our own command."""
        return shlex.join(self._person(arguments))

    def _person(self, arguments: tuple[str, ...]) -> list[str]:
        ours = self.runtime == "kata"
        image = f"oci:{ROOT}/build/images/busybox" if ours else "bb"
        command = [str(ROOT / "src/kata/__main__.py")] if ours else ["docker"]
        return [*command, *(image if word == "IMAGE" else word for word in arguments)]

    def person(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run what `words` has; as `run` returns it."""
        return self._done(self._person(arguments), stdin)

    def shell(self, script: str) -> str:
        """Run a shell's command line; its standard output and exit status."""
        done = subprocess.run(
            ["sh", "-c", script], env=self.docker.env, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        said = done.stdout.decode().strip()
        return f"{said}; status {done.returncode}" if said else str(done.returncode)

    @contextmanager
    def person_running(self, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        """Like `running`, with our own command where kata is the runtime."""
        self._count += 1
        name = f"w{os.getpid()}-own-{self._count}"
        said = self.person("run", "-d", "--name", name, *options, "IMAGE", *command)
        assert said.endswith("status 0"), said
        try:
            yield name
        finally:
            self.person("rm", "-f", name)

    def around(self) -> list[str]:
        """What leads a command to where published ports are."""
        return [] if self.runtime == "kata" else self.docker.containerd.around

    def pid(self, name: str) -> int:
        """The pid of a container's task on the host: with kata the hypervisor's."""
        return int(self.docker("inspect", "--format", "{{.State.Pid}}", name))


def settled(look: Callable[[], str], wanted: str) -> str:
    """What is seen once it is as wanted, or as long as it has time to become so."""
    deadline = time.monotonic() + PATIENCE / 8
    while (seen := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def free_port() -> int:
    """A port that nobody has at this host's loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _python(code: str) -> tuple[str, str, str]:
    return ("python3", "-c", code)


# ---- shared files ----


def changed_file(box: Box) -> str:
    """the host changes a file that a container has mounted by itself (a configuration file)"""
    place = box.fresh()
    (place / "conf").write_text("level=info\n")
    with box.running(options=("-v", f"{place}/conf:/conf:ro", "-v", f"{place}:/v")) as name:
        first = box.exec(name, "cat", "/conf")
        (place / "conf").write_text("level=debug\n")
        alone = settled(lambda: box.exec(name, "cat", "/conf"), "level=debug; status 0")
        return f"{first}, {alone}, {box.exec(name, 'cat', '/v/conf')}"


def appended_log(box: Box) -> str:
    """`tail -f` in a container of a log that the host appends to"""
    place = box.fresh()
    (place / "log").write_text("one\n")
    with box.running("tail", "-f", "/v/log", image="bb", options=("-v", f"{place}:/v")) as name:
        until(lambda: "one" in box.docker("logs", name), "the first line")
        with open(place / "log", "a") as log:
            log.write("two\n")
        said = lambda: box.docker("logs", name).replace("\0", "NUL").strip().replace("\n", " ")  # noqa: E731
        return settled(said, "one two")


def one_database(box: Box) -> str:
    """host and container write one SQLite file"""
    place = box.fresh()
    code = (
        "import sqlite3,sys,time\n"
        "d=sqlite3.connect(sys.argv[1]+'/db',timeout=60,isolation_level=None)\n"
        "d.execute('create table if not exists t(who)')\n"
        "for n in range(20): d.execute('insert into t values(?)',(sys.argv[2],)); time.sleep(.05)\n"
        "print(d.execute('pragma integrity_check').fetchone()[0])\n"
    )
    with box.running(options=("-v", f"{place}:/v")) as name:
        inside = subprocess.Popen(
            ["docker", "exec", name, *_python(code), "/v", "container"],
            env=box.docker.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        outside = subprocess.run(
            ["/usr/bin/python3", "-c", code, str(place), "host"], capture_output=True, text=True, check=False
        )
        said = inside.communicate()[0].decode().strip().splitlines()
    count = "import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from t').fetchone()[0])"
    rows = subprocess.run(
        ["/usr/bin/python3", "-c", count, str(place / "db")], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{said[-1] if said else 'nothing'}, {outside.stdout.strip() or outside.stderr.strip()[-60:]}, {rows} rows"


def database_wal(box: Box) -> str:
    """SQLite's write-ahead log (shared mmap) on a volume"""
    code = (
        "import sqlite3\nd=sqlite3.connect('/v/db')\nprint(d.execute('pragma journal_mode=wal').fetchone()[0])\n"
        "d.execute('create table t(a)')\nd.execute('insert into t values(1)')\nd.commit()\n"
        "print(d.execute('select count(*) from t').fetchone()[0])"
    )
    return box.run(*_python(code), options=("-v", f"{box.fresh()}:/v"))


_WRITER = (
    "import os,time\nf=os.open('%s/log',os.O_WRONLY|os.O_CREAT|os.O_APPEND)\n"
    "for n in range(10): os.write(f,b'line\\n')\nprint('written',flush=True)\ntime.sleep(1000)"
)


@contextmanager
def _writer(box: Box, where: str, *options: str) -> Iterator[str]:
    with box.running(*_python(_WRITER % where), options=options) as name:
        until(lambda: "written" in box.docker("logs", name), "the lines are written")
        yield name


def written_at_once(box: Box) -> str:
    """lines that a container writes into an open file of a volume, seen by the host at once"""
    place = box.fresh()
    with _writer(box, "/v", "-v", f"{place}:/v"):
        return f"{len((place / 'log').read_text().splitlines())} lines"


def copied_while_open(box: Box) -> str:
    """`docker cp` of a file that a running container has open"""
    with _writer(box, "") as name:
        archive = subprocess.run(
            ["docker", "cp", f"{name}:/log", "-"], env=box.docker.env, capture_output=True, check=False
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            file = tar.extractfile("log")
            return f"{len(file.read().splitlines()) if file else 0} lines"


def committed_while_open(box: Box) -> str:
    """`docker commit` of a container that has a file open"""
    image = f"made-{box.runtime}"
    with _writer(box, "") as name:
        box.docker("commit", name, image)
    try:
        return box.docker("run", "--rm", image, "wc", "-l", "/log").split()[0] + " lines"
    finally:
        box.docker("rmi", "-f", image, code=None)


def killed_after_write(box: Box) -> str:
    """what was written before the container's process on the host was killed"""
    place = box.fresh()
    with _writer(box, "/v", "-v", f"{place}:/v") as name:
        os.kill(box.pid(name), signal.SIGKILL)
        return f"{box.docker('wait', name).strip()}, {len((place / 'log').read_text().splitlines())} lines"


def appended_by_two(box: Box) -> str:
    """two containers append to one file"""
    place = box.fresh()
    code = (
        "import os,time\nf=os.open('/v/log',os.O_WRONLY|os.O_CREAT|os.O_APPEND)\nopen('/v/'+os.uname()[1],'w')\n"
        "while len(os.listdir('/v'))<3: time.sleep(.05)\n"  # both are there
        "for n in range(50): os.write(f,b'line\\n'); time.sleep(.02)"
    )
    options = ("-v", f"{place}:/v")
    with (
        box.running(*_python(code), options=options) as one,
        box.running(*_python(code), options=options) as two,
    ):
        for name in (one, two):
            box.docker("wait", name)
        return f"{len((place / 'log').read_text().splitlines())} lines"


_NODES = (
    "import os,socket\nos.mkfifo('%s/fifo')\ns=socket.socket(socket.AF_UNIX)\ns.bind('%s/sock')\ns.listen()\n"
    "c=socket.socket(socket.AF_UNIX)\nc.connect('%s/sock')\nprint('made')"
).replace("%s", "{0}")


def nodes_in_root(box: Box) -> str:
    """a fifo and a unix socket in the container's /tmp"""
    return box.run(*_python(_NODES.format("/tmp")))


def nodes_in_volume(box: Box) -> str:
    """a fifo and a unix socket in a volume"""
    return box.run(*_python(_NODES.format("/v")), options=("-v", f"{box.fresh()}:/v"))


def removed_while_open(box: Box) -> str:
    """a file that the host removes while it is open inside, made again inside"""
    place = box.fresh()
    (place / "held").write_text("a")
    with box.running(
        "sh", "-c", "exec 3</v/held; echo up; sleep 1000", options=("-v", f"{place}:/v")
    ) as name:
        until(lambda: "up" in box.docker("logs", name), "it is open")
        (place / "held").unlink()
        return box.exec(name, "sh", "-c", "echo b > /v/held && cat /v/held")


def top_mode(box: Box) -> str:
    """the host grants and revokes the right to a volume's top directory"""
    place = box.fresh()
    place.chmod(0o755)
    (place / "file").write_text("x")
    with box.running(options=("-v", f"{place}:/v", "-u", "1000")) as name:
        seen = []
        command = "touch /v/new 2>/dev/null && cat /v/file >/dev/null"
        for mode, wanted in ((0o777, "0"), (0o700, "1")):
            place.chmod(mode)
            seen.append(settled(lambda: box.exec(name, "sh", "-c", command).split()[-1], wanted))
        return f"granted: status {seen[0]}, revoked: status {seen[1]}"


def unlinked_file(box: Box) -> str:
    """ftruncate, fchmod and times of a file that is unlinked and open"""
    code = (
        "import os\nf=os.open('/tmp/a',os.O_RDWR|os.O_CREAT)\nos.unlink('/tmp/a')\nos.ftruncate(f,131072)\n"
        "os.fchmod(f,0o600)\nos.utime(f,(1,2))\ns=os.fstat(f)\nprint(s.st_size,oct(s.st_mode&0o777),int(s.st_mtime))"
    )
    return box.run(*_python(code))


def watched_volume(box: Box) -> str:
    """inotify in a container of what the host makes in a volume"""
    place = box.fresh()
    code = (
        "import ctypes,os,select\nc=ctypes.CDLL(None)\nf=c.inotify_init()\n"
        "c.inotify_add_watch(f,b'/v',0x100)\nprint('up',flush=True)\n"
        "print('told' if select.select([f],[],[],10)[0] else 'not told')"
    )
    with box.running(*_python(code), options=("-v", f"{place}:/v")) as name:
        until(lambda: "up" in box.docker("logs", name), "it watches")
        (place / "new").write_text("")
        box.docker("wait", name)
        said = box.docker("logs", name).split("\n")[1]
    kind = box.run("stat", "-f", "-c", "%T", "/v", image="bb", options=("-v", f"{place}:/v")).split(";")[0]
    return said if said == "told" else f"{said}, file system {kind}"


def locked(box: Box) -> str:
    """an exclusive flock on a volume, asked for by a second container"""
    place = box.fresh()
    hold = "import fcntl,time\nf=open('/v/lock','w')\nfcntl.flock(f,2)\nprint('held',flush=True)\ntime.sleep(1000)"
    take = (
        "import fcntl\nf=open('/v/lock','w')\ntry:\n fcntl.flock(f,6); print('got it')\n"
        "except BlockingIOError: print('refused')"
    )
    options = ("-v", f"{place}:/v")
    with box.running(*_python(hold), options=options) as name:
        until(lambda: "held" in box.docker("logs", name), "the lock is held")
        return box.run(*_python(take), options=options)


def modern_files(box: Box) -> str:
    """fallocate, O_TMPFILE, RENAME_EXCHANGE, nanosecond times in a volume"""
    code = (
        "import os,ctypes\nc=ctypes.CDLL(None,use_errno=True)\n"
        "def t(name,f):\n"
        "  try: f(); print(name,end=' ')\n"
        "  except OSError as e: print('no',name,end=' ')\n"
        "def x(v):\n"
        "  if v!=0: raise OSError(ctypes.get_errno(),'')\n"
        "f=os.open('/v/a',os.O_RDWR|os.O_CREAT)\nopen('/v/b','w').close()\n"
        "t('fallocate',lambda:x(c.fallocate(f,0,ctypes.c_long(0),ctypes.c_long(8192))))\n"
        "t('tmpfile',lambda:os.open('/v',os.O_RDWR|os.O_TMPFILE))\n"
        "t('exchange',lambda:x(c.renameat2(-100,b'/v/a',-100,b'/v/b',2)))\n"
        "def ns():\n"
        "  os.utime('/v/a',ns=(5,1000000007))\n"
        "  if os.stat('/v/a').st_mtime_ns!=1000000007: raise OSError\n"
        "t('nanoseconds',ns)"
    )
    return box.run(*_python(code), options=("-v", f"{box.fresh()}:/v"))


# ---- what a container finds inside ----


def ipv6_off(box: Box) -> str:
    """IPv6 on Docker's default bridge, which has none"""
    show = "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr show eth0 | grep -c inet6; true"
    return box.run("sh", "-c", show, image="bb")


def no_input(box: Box) -> str:
    """standard input of a process without -i, in run and exec"""
    with box.running() as name:
        script = ("readlink", "/proc/self/fd/0")
        return f"{box.run(*script)}, {box.exec(name, *script)}"


def open_files(box: Box) -> str:
    """raising the limit of open files as an ordinary process may"""
    return box.run("sh", "-c", "ulimit -n 15000 && ulimit -n")


def sparse_mapping(box: Box) -> str:
    """a sparse mapping of 400 MiB in a container of 256 MiB"""
    code = "import mmap; m=mmap.mmap(-1,400<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS); m[0]=1; print('mapped')"
    return box.run(*_python(code), options=("-m", "256m"))


def out_of_memory(box: Box) -> str:
    """300 MiB in a container of 100 MiB"""
    with box.running(
        *_python("x=bytearray(300<<20)"), options=("-m", "100m", "--memory-swap", "100m")
    ) as name:
        code = box.docker("wait", name).strip()
        return f"{code}, OOMKilled {box.docker('inspect', '--format', '{{.State.OOMKilled}}', name).strip()}"


def whole_memory(box: Box) -> str:
    """240 MiB of one process in a container of 256 MiB"""
    code = "x=bytearray(240<<20)\nfor n in range(0,len(x),4096): x[n]=1\nprint('fits')"
    return box.run(*_python(code), options=("-m", "256m", "--memory-swap", "256m"))


def cpu_set(box: Box) -> str:
    """--cpuset-cpus 0,1 gives two processors"""
    if os.cpu_count() == 1:
        return _ONE_PROCESSOR
    return box.run("nproc", image="bb", options=("--cpuset-cpus", "0,1"))


def read_only_below(box: Box) -> str:
    """a mount below a read-only volume"""
    place = box.fresh()
    (place / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place / "sub")], check=True)
    try:
        return box.run("touch", "/v/sub/x", image="bb", options=("-v", f"{place}:/v:ro"))
    finally:
        subprocess.run(["umount", str(place / "sub")], check=True)


def loop_device(box: Box) -> str:
    """mount -o loop in a privileged container"""
    script = (
        "dd if=/dev/zero of=/i bs=1M count=4 2>/dev/null; mke2fs -F /i >/dev/null 2>&1; mkdir /m;"
        " mount -o loop /i /m && ls /m"
    )
    return box.run("sh", "-c", script, image="bb", options=("--privileged",))


# ---- life and clients ----


def silent_guest(box: Box) -> str:
    """`docker rm -f` when the container's process on the host is stopped (SIGSTOP)"""
    with box.running() as name:
        os.kill(box.pid(name), signal.SIGSTOP)
        started = time.monotonic()
        said = box.call("rm", "-f", name).rpartition("; ")[2]
        soon = time.monotonic() - started < PATIENCE / 4
        return f"{said}, {'soon' if soon else 'late'}"


def exec_beside_cgroups(box: Box) -> str:
    """exec into a container whose processes have made cgroups of their own"""
    script = (
        "cd /sys/fs/cgroup; if test -e cgroup.subtree_control; then mkdir init; echo 1 > init/cgroup.procs;"
        " echo +memory +pids > cgroup.subtree_control; fi; echo up; sleep 1000"
    )
    options = ("--privileged", "--cgroupns", "private")
    with box.running("sh", "-c", script, image="bb", options=options) as name:
        until(lambda: "up" in box.docker("logs", name), "the cgroups are made")
        return box.exec(name, "echo", "inside")


def names_on_a_network(box: Box) -> str:
    """names of other containers on a network of one's own"""
    network = f"n{os.getpid()}"
    box.docker("network", "create", network)
    try:
        with box.running(image="bb", options=("--network", network, "--network-alias", "api")):
            said = box.run("nslookup", "api", image="bb", options=("--network", network))
            return "found" if re.search(r"Name:\s*api", said) and "status 0" in said else said
    finally:
        box.docker("network", "rm", network, code=None)


def connected_later(box: Box) -> str:
    """`docker network connect` to a running container"""
    network = f"n{os.getpid()}"
    box.docker("network", "create", network)
    try:
        with box.running(image="bb") as name:
            box.docker("network", "connect", network, name)
            count = "ls /sys/class/net | grep -c eth"
            return settled(lambda: box.exec(name, "sh", "-c", count), "2; status 0")
    finally:
        box.docker("network", "rm", network, code=None)


def no_network(box: Box) -> str:
    """the interfaces of a container with --network none"""
    return box.run("ls", "/sys/class/net", image="bb", options=("--network", "none"))


def hosts_uts(box: Box) -> str:
    """the host name with --uts host"""
    said = box.run("hostname", image="bb", options=("--uts", "host"))
    return "the host's" if said.startswith(f"{os.uname().nodename};") else said


def large_environment(box: Box) -> str:
    """4000 variables, as the services of a large Kubernetes namespace make"""
    file = box.fresh() / "env"
    file.write_text("".join(f"SERVICE_{n}_PORT=tcp://10.0.0.1:{n}\n" for n in range(4000)))
    return box.run("sh", "-c", "env | grep -c SERVICE_", image="bb", options=("--env-file", str(file)))


def top_lines(box: Box) -> str:
    """`docker top` shows what a process is, and not pages of arguments"""
    with box.running() as name:
        longest = max(len(line) for line in box.docker("top", name).splitlines())
        return "fits" if longest < 300 else f"lines of {longest} characters"


def shown_limit(box: Box) -> str:
    """`docker stats` of a container without a limit: what it can have"""
    with box.running() as name:
        limit = box.docker("stats", "--no-stream", "--format", "{{.MemUsage}}", name).split("/")[1].strip()
        inside = int(box.docker("exec", name, "sh", "-c", "grep MemTotal /proc/meminfo").split()[1])
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", limit).groups()  # type: ignore[union-attr]
        kib = float(number) * {"KiB": 1, "MiB": 1024, "GiB": 1 << 20}[unit]
        return (
            "what the container sees"
            if abs(kib - inside) < 0.02 * inside
            else f"{limit}, inside {inside} KiB"
        )


def hard_links_copied(box: Box) -> str:
    """`docker cp` of a tree with hard links, fifos and symbolic links into a container and out again"""
    place = box.fresh()
    (place / "d").mkdir()
    (place / "d/a").write_text("data")
    os.link(place / "d/a", place / "d/b")
    os.mkfifo(place / "d/f")
    os.symlink("a", place / "d/c")
    with box.running(image="bb") as name:
        box.docker("cp", str(place / "d"), f"{name}:/d")
        inside = box.exec(name, "stat", "-c", "%n %h", "/d/a", "/d/b").splitlines()
        box.docker("cp", f"{name}:/d", str(place / "out"))
        out = place / "out"
        same = (out / "a").stat().st_ino == (out / "b").stat().st_ino
        kinds = (out / "f").is_fifo() and (out / "c").is_symlink()
        return f"{inside[0]}, out again linked: {same}, kinds kept: {kinds}"


# ---- the command of our own, beside Docker's with runc ----


def env_file(box: Box) -> str:
    """`run --env-file` of a file from a Windows editor, with odd separators in its values"""
    file = box.fresh() / "env"
    file.write_bytes(b"\xef\xbb\xbfFIRST=1\nSECOND=two\xe2\x80\xa8words\nTHIRD=a\x0cb\n")
    said = box.person(
        "run", "--rm", "--env-file", str(file), "IMAGE", "sh", "-c", "env | grep -E 'FIRST|SECOND|THIRD'"
    )
    return ascii(" ".join(sorted(said.rpartition("; ")[0].split("\n"))))


def volume_words(box: Box) -> str:
    """`run -v` with words of Docker's and Podman's: cached, delegated, consistent, z"""
    seen = []
    for word in ("cached", "delegated", "consistent", "z", "ro,Z"):
        place = box.fresh()
        seen.append(box.person("run", "--rm", "-v", f"{place}:/v:{word}", "IMAGE", "true").split()[-1])
    return " ".join(seen)


def archive_into(box: Box) -> str:
    """`cp - NAME:DIR` of an archive with a hard link and a fifo"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        first = tarfile.TarInfo("a")
        first.size = 4
        tar.addfile(first, io.BytesIO(b"data"))
        for name, kind in (("b", tarfile.LNKTYPE), ("f", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a"
            tar.addfile(entry)
    with box.person_running("sleep", "1000") as name:
        copied = box.person("cp", "-", f"{name}:/tmp", stdin=out.getvalue()).split()[-1]
        look = "stat -c %h /tmp/a /tmp/b; test -p /tmp/f && echo fifo"
        return f"status {copied}: {box.person('exec', name, 'sh', '-c', look)}"


def closed_output(box: Box) -> str:
    """`run` with standard output or input closed (>&-, <&-)"""
    seen = []
    for closed in (">&-", "<&-", ">&- <&- 2>&-"):
        seen.append(
            box.shell(f"{box.words('run', '--rm', '-i', 'IMAGE', 'sh', '-c', 'echo x; exit 3')} {closed}")
        )
    return " ".join(seen)


def reader_gone(box: Box) -> str:
    """`run --rm ... yes | head -1` ends"""
    said = box.shell(f"{box.words('run', '--rm', '--name', 'endless', 'IMAGE', 'yes')} | head -n 1")
    try:
        until(
            lambda: "endless" not in box.person("ps", "--no-trunc"), "it has ended", patience_s=PATIENCE / 4
        )
    except AssertionError:
        said += ", goes on for ever"
    finally:
        box.person("rm", "-f", "endless")
    return said


def speaks_first(box: Box) -> str:
    """a server behind `run -p` that speaks before its client does (SSH, SMTP, MySQL)"""
    serve = ("sh", "-c", "while :; do nc -l -p 25 -e echo hello; done")
    port = free_port()
    with box.person_running(*serve, options=("-p", f"127.0.0.1:{port}:25")):
        talk = (
            "import socket,time\nfor n in range(60):\n"
            f" try:\n  s=socket.create_connection(('127.0.0.1',{port}),5); s.settimeout(5)\n"
            "  print(s.recv(9).decode().strip())\n"
            " except OSError: time.sleep(.5); continue\n"
            " break\n"
        )
        around = box.around()
        done = subprocess.run(
            [*around, "/usr/bin/python3", "-c", talk], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or "nothing"


CASES: tuple[Callable[[Box], str], ...] = (
    *(changed_file, appended_log, one_database, database_wal, written_at_once, copied_while_open),
    *(committed_while_open, killed_after_write, appended_by_two, nodes_in_root, nodes_in_volume),
    *(removed_while_open, top_mode, unlinked_file, watched_volume, locked, modern_files),
    *(ipv6_off, no_input, open_files, sparse_mapping, out_of_memory, whole_memory, cpu_set, read_only_below),
    *(loop_device, silent_guest, exec_beside_cgroups, names_on_a_network, connected_later, no_network),
    *(hosts_uts, large_environment, top_lines, shown_limit, hard_links_copied),
    *(env_file, volume_words, archive_into, closed_output, reader_gone, speaks_first),
)
EXPECTED: dict[Callable[[Box], str], str] = {
    changed_file: "level=info; status 0, level=debug; status 0, level=debug; status 0",
    appended_log: "one two",
    one_database: "ok, ok, 40 rows",
    database_wal: "wal\n1; status 0",
    written_at_once: "10 lines",
    copied_while_open: "10 lines",
    committed_while_open: "10 lines",
    killed_after_write: "137, 10 lines",
    appended_by_two: "100 lines",
    nodes_in_root: "made; status 0",
    nodes_in_volume: "made; status 0",
    removed_while_open: "b; status 0",
    top_mode: "granted: status 0, revoked: status 1",
    unlinked_file: "131072 0o600 2; status 0",
    watched_volume: "told",
    locked: "refused; status 0",
    modern_files: "fallocate tmpfile exchange nanoseconds; status 0",
    ipv6_off: "1\n0; status 0",
    no_input: "/dev/null; status 0, /dev/null; status 0",
    open_files: "15000; status 0",
    sparse_mapping: "mapped; status 0",
    out_of_memory: "137, OOMKilled true",
    whole_memory: "fits; status 0",
    cpu_set: "2; status 0",
    read_only_below: ".*Read-only file system; status 1",
    loop_device: "lost\\+found; status 0",
    silent_guest: "status 0, soon",
    exec_beside_cgroups: "inside; status 0",
    names_on_a_network: "found",
    connected_later: "2; status 0",
    no_network: "lo; status 0",
    hosts_uts: "the host's",
    large_environment: "4000; status 0",
    top_lines: "fits",
    shown_limit: "what the container sees",
    env_file: r"'FIRST=1 SECOND=two\\u2028words THIRD=a\\x0cb'",
    volume_words: "0 0 0 0 0",
    archive_into: "status 0: 2\n2\nfifo; status 0",
    closed_output: "3 x; status 3 3",
    reader_gone: "y; status 0",
    speaks_first: "hello",
    hard_links_copied: "/d/a 2, out again linked: True, kinds kept: True",
}
"""What is right, as a regular expression."""
_ONE_PROCESSOR = "one processor"
LIMITS: dict[Callable[[Box], str], tuple[str, str]] = {
    watched_volume: (
        "not told, file system (fuse.*|UNKNOWN)",
        "no file server tells of the host's changes; programs that see a file system of FUSE's poll",
    ),
    one_database: (
        ".*",
        "locks do not reach from one machine to another (Shared files, above): let one side write at a time",
    ),
    cpu_set: (_ONE_PROCESSOR, "not tried: the KVM lab has one processor"),
    locked: ("got it; status 0", "each machine keeps its own locks (Shared files, above)"),
    modern_files: (
        "fallocate no tmpfile exchange nanoseconds; status 0",
        "O_TMPFILE is refused by the file servers; programs fall back",
    ),
}
"""Where kata does otherwise: what is seen then, as a regular expression, and why."""


@dataclass(frozen=True)
class Seen:
    """What came out of one case in one column."""

    case: str
    column: str
    said: str


class Record:
    """What has been seen so far, kept in a file.

    Args:
        path: The file: a JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], str] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                seen = Seen(**json.loads(line))
                self.found[seen.case, seen.column] = seen.said

    def add(self, seen: Seen) -> None:
        """Note one, at once and for good."""
        self.found[seen.case, seen.column] = seen.said
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(seen)) + "\n")

    def forget(self, text: str, columns: tuple[str, ...]) -> None:
        """Drop what was seen in these columns of the cases whose name contains a text."""
        kept = [
            Seen(case, column, said)
            for (case, column), said in self.found.items()
            if text not in case or column not in columns
        ]
        self.path.unlink(missing_ok=True)
        self.found = {}
        for seen in kept:
            self.add(seen)


def run(guest: Path, record: Record, columns: tuple[str, ...], only: str) -> None:
    """Try what has not been tried.

    Args:
        guest: The guest's directory.
        record: Is added to.
        columns: Which of `COLUMNS`.
        only: Only cases whose name or description contains this.
    """
    todo = [
        (case, column)
        for case in CASES
        for column in columns
        if (case.__name__, column) not in record.found and only in f"{case.__name__} {case.__doc__}"
    ]
    if not todo:
        return
    with _docker(guest) as docker:
        for case, column in todo:
            directory = Path(tempfile.mkdtemp(dir=docker.directory))
            try:
                said = case(Box(docker, column.partition(",")[0], directory))
            except (
                AssertionError,
                subprocess.SubprocessError,
                OSError,
                ValueError,
                LookupError,
                AttributeError,
            ) as error:
                said = f"failed: {type(error).__name__}: {str(error)[:300]}"
            record.add(Seen(case.__name__, column, said))
            print(f"{column}: {verdict(case, column, said)}: {case.__doc__}", flush=True)
            if verdict(case, column, said) != "right":
                print(f"    {said[:600]}", flush=True)


@contextmanager
def _docker(guest: Path) -> Iterator[Dockerd]:
    if shutil.which("dockerd", path=PROGRAMS) is None:
        pytest.skip("needs Docker (tools/setup test unpacks it)")
    # A short path: there are sockets in it.
    directory = Path(tempfile.mkdtemp(prefix="kw", dir=os.environ.get("KATA_WORK_DIR", "/tmp")))
    daemon = Dockerd(directory, guest)
    daemon.netns = daemon.containerd.around[1].rpartition("/")[2]
    (directory / "daemon.json").write_text("{}")
    subprocess.run(["ip", "netns", "add", daemon.netns], check=True)
    try:
        subprocess.run(["ip", "-n", daemon.netns, "link", "set", "lo", "up"], check=True)
        daemon.start()
        daemon("import", "-", "py", stdin=image(python=True))
        daemon("import", "-", "bb", stdin=image(python=False))
        yield daemon
    finally:
        for name in daemon("ps", "-aq", code=None).split():
            daemon("rm", "-f", name, code=None)
        daemon.stop()
        subprocess.run(["ip", "netns", "delete", daemon.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


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


def verdict(case: Callable[[Box], str], column: str, said: str) -> str:
    """What the table says: ``right``, ``differs`` for a reason that is known, or ``wrong``."""
    if re.fullmatch(EXPECTED[case], said, re.DOTALL):
        return "right"
    limit = LIMITS.get(case)
    if column != "runc" and limit and re.fullmatch(limit[0], said, re.DOTALL):
        return "differs"
    return "wrong"


def wrong(found: Mapping[tuple[str, str], str]) -> list[str]:
    """What is neither right nor a limit that is known, with kata."""
    return [
        f"{case.__doc__} ({column}): {said[:200]}"
        for case in CASES
        for column in COLUMNS[1:]
        if (said := found.get((case.__name__, column))) is not None
        and verdict(case, column, said) == "wrong"
    ]


def table(found: Mapping[tuple[str, str], str]) -> list[str]:
    """The table's lines."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for case in CASES:
        cells = []
        for column in COLUMNS:
            said = found.get((case.__name__, column))
            word = "" if said is None else verdict(case, column, said)
            if said is not None and word == "wrong":
                word = "`" + said.replace("\n", " ").replace("|", "/").replace("`", "'")[:60] + "`"
            elif word == "differs":
                word = LIMITS[case][1]
            cells.append(word)
        what = str(case.__doc__).replace("|", "\\|")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def write(page: Path, found: Mapping[tuple[str, str], str]) -> None:
    """Put the table into a page, between its marks.

    Raises:
        ValueError: The page has no such marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table")
    page.write_text(before + begin + "\n".join(table(found)) + "\n" + end + after)
