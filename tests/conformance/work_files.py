"""Cases of people's real work: files that a container shares with its host."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from waiting import until
from work_box import Box, python, settled


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
            ["docker", "exec", name, *python(code), "/v", "container"],
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
    return box.run(*python(code), options=("-v", f"{box.fresh()}:/v"))


_WRITER = (
    "import os,time\nf=os.open('%s/log',os.O_WRONLY|os.O_CREAT|os.O_APPEND)\n"
    "for n in range(10): os.write(f,b'line\\n')\nprint('written',flush=True)\ntime.sleep(1000)"
)


@contextmanager
def _writer(box: Box, where: str, *options: str) -> Iterator[str]:
    with box.running(*python(_WRITER % where), options=options) as name:
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
        box.running(*python(code), options=options) as one,
        box.running(*python(code), options=options) as two,
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
    return box.run(*python(_NODES.format("/tmp")))


def nodes_in_volume(box: Box) -> str:
    """a fifo and a unix socket in a volume"""
    return box.run(*python(_NODES.format("/v")), options=("-v", f"{box.fresh()}:/v"))


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
    return box.run(*python(code))


def watched_volume(box: Box) -> str:
    """inotify in a container of what the host makes in a volume"""
    place = box.fresh()
    code = (
        "import ctypes,os,select\nc=ctypes.CDLL(None)\nf=c.inotify_init()\n"
        "c.inotify_add_watch(f,b'/v',0x100)\nprint('up',flush=True)\n"
        "print('told' if select.select([f],[],[],10)[0] else 'not told')"
    )
    with box.running(*python(code), options=("-v", f"{place}:/v")) as name:
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
    with box.running(*python(hold), options=options) as name:
        until(lambda: "held" in box.docker("logs", name), "the lock is held")
        return box.run(*python(take), options=options)


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
    return box.run(*python(code), options=("-v", f"{box.fresh()}:/v"))
