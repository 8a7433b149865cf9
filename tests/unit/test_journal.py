"""The journal: written before the deed, undone by identity, whatever was torn on the way."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata import children, journal_undo, mount_table, sysio
from kata.errors import AlreadyExistsError, JournalError
from kata.journal import Journal, process_identity
from kata.journal_undo import reconcile, reconcile_sandboxes
from kata.json_text import dumps, loads

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def new(base: Path, name: str = "a") -> Journal:
    return Journal.create_dir(str(base / "sandboxes"), name, {"client": "test", "id": name})


def orphan(journal: Journal) -> None:
    """Make the owner somebody who has ended."""
    ended = subprocess.Popen(["true"])
    identity = process_identity(ended.pid)
    ended.wait()
    with open(journal.path, "a", encoding="ascii") as file:
        file.write(dumps({"owner": identity}) + "\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_small_json_writer_agrees_with_json(value: Any) -> None:
    text = dumps(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert "\n" not in text


def test_import_is_light() -> None:
    code = "import sys, kata.journal; print('json' in sys.modules, 're' in sys.modules, 'typing' in sys.modules)"
    path = str(Path(__file__).parents[2] / "src")
    command = f"import sys; sys.path.insert(0, {path!r}); {code}"
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", command], capture_output=True, check=True, text=True
    )
    assert said.stdout.split() == ["False", "False", "False"]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    journal = new(tmp_path)
    path = tmp_path / "thing"
    entry = journal.begin("file", path=str(path), note="é\n")
    assert [line for line in Path(journal.path).read_text().splitlines() if "thing" in line], (
        "not on disk yet"
    )
    path.write_text("x")
    journal.commit(entry)
    gone = journal.begin("socket", path=str(tmp_path / "s"))
    journal.mark_gone(gone)
    journal.retain("")
    again = Journal.open(journal.path)
    assert again.meta == {"client": "test", "id": "a"}
    assert again.retained
    assert again.owner_alive()
    assert [(e.kind, e.params.get("note"), e.gone) for e in again.entries] == [
        ("file", "é\n", False),
        ("socket", None, True),
    ]
    assert again.entries[0].identity == {"dev": path.stat().st_dev, "ino": path.stat().st_ino}


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    new(tmp_path)
    with pytest.raises(AlreadyExistsError):
        new(tmp_path)
    assert os.listdir(tmp_path / "sandboxes") == ["a"]
    with pytest.raises(AlreadyExistsError):
        Journal.create(str(tmp_path / "sandboxes" / "a" / "journal"), {})


def test_files_sockets_and_trees_are_undone_in_reverse(tmp_path: Path) -> None:
    journal = new(tmp_path)
    tree = tmp_path / "tree"
    journal.make_directory(str(tree))
    inner = tree / "inner"
    journal.make_directory(str(inner))
    (inner / "file").write_text("x")
    deep = inner
    for _ in range(50):
        deep = deep / "d"
        deep.mkdir()
    (deep / "link").symlink_to("/etc/passwd")
    entry = journal.begin("socket", path=str(tmp_path / "sock"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        journal.commit(entry)
    assert journal_undo.undo(journal) == []
    assert not list(tmp_path.rglob("*/*"))
    assert Path("/etc/passwd").exists()
    assert journal.fileno() < 0, "still open"


def test_undo_is_idempotent_and_for_anybody(tmp_path: Path) -> None:
    journal = new(tmp_path)
    other = Journal.open(journal.path)
    assert journal_undo.undo(journal) == []
    assert journal_undo.undo(other) == []


def test_what_replaced_ours_is_left_alone(tmp_path: Path) -> None:
    journal = new(tmp_path)
    file, directory = tmp_path / "file", tmp_path / "dir"
    entry = journal.begin("file", path=str(file))
    file.write_text("ours")
    journal.commit(entry)
    journal.make_directory(str(directory))
    file.rename(tmp_path / "moved")
    file.write_text("somebody else's")
    directory.rename(tmp_path / "moved-dir")
    directory.mkdir()
    (directory / "theirs").write_text("x")
    assert journal_undo.undo(journal) == []
    assert file.read_text() == "somebody else's"
    assert (directory / "theirs").exists()


def test_without_identity_only_what_was_absent_is_ours(tmp_path: Path) -> None:
    journal = new(tmp_path)
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text("was there")
    journal.begin("file", path=str(before))
    journal.begin("file", path=str(after))
    after.write_text("made, and then the maker died")
    orphan(journal)
    journal.close()
    assert reconcile(str(tmp_path), str(tmp_path / "state")).failures == []
    assert before.exists()
    assert not after.exists()


def test_a_symlink_in_a_tree_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    journal = new(tmp_path)
    tree = tmp_path / "tree"
    journal.make_directory(str(tree))
    (tree / "link").symlink_to(victim)
    assert journal_undo.undo(journal) == []
    assert (victim / "precious").exists()
    journal = new(tmp_path)
    journal.make_directory(str(tree))
    tree.rmdir()
    tree.symlink_to(victim)
    assert journal_undo.undo(journal) == []
    assert (victim / "precious").exists()


def test_a_tree_deeper_than_files_may_be_opened(tmp_path: Path) -> None:
    here = tmp_path
    for number in range(300):
        here = here / "d"
        here.mkdir()
        (here / f"file{number}").touch()
    (tmp_path / "spared").touch()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            os.closerange(3, 64)
            fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
            said = journal_undo.empty(fd, str(tmp_path), time.monotonic() + 60, "spared").encode()
        finally:
            os._exit(len(said) and 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(tmp_path) == ["spared"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_tolerated(tmp_path: Path, cut: int) -> None:
    journal = new(tmp_path)
    kept = journal.make_directory(str(tmp_path / "kept"))
    journal.begin("directory", path=str(tmp_path / "never"))
    journal.close()
    path = Path(journal.path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal.open(str(path))
    assert [e.id for e in again.entries if e.identity] == [kept.id]
    again.make_directory(str(tmp_path / "later"))
    assert Journal.open(str(path)).entries[-1].params["path"] == str(tmp_path / "later")
    assert journal_undo.undo(again) == []
    assert not (tmp_path / "kept").exists()
    assert not (tmp_path / "later").exists()


def test_a_damaged_journal_is_reported_not_obeyed(tmp_path: Path) -> None:
    directory = tmp_path / "sandboxes" / "bad"
    directory.mkdir(parents=True)
    (directory / "journal").write_text("not a journal\n")
    with pytest.raises(JournalError):
        Journal.open(str(directory / "journal"))
    report = reconcile(str(tmp_path), str(tmp_path / "state"))
    assert len(report.failures) == 1
    assert directory.exists()


def test_processes_are_ended_by_identity(tmp_path: Path) -> None:
    journal = new(tmp_path)
    stubborn = "import signal, time; signal.signal(15, 1); print(flush=True); time.sleep(600)"
    read, write = os.pipe()
    first = children.spawn(["/bin/sleep", "600"], journal, "sleeper", terminate_first=True)
    second = children.spawn([sys.executable, "-c", stubborn], journal, "stubborn", stdout=write)
    assert os.read(read, 1) == b"\n"
    os.close(read)
    os.close(write)
    stranger = subprocess.Popen(["sleep", "600"])
    entry = journal.begin("process", role="stranger")
    journal.commit(entry, pid=stranger.pid, start=1)  # another start time: not the process we mean
    try:
        assert journal_undo.undo(journal) == []
        assert first.poll() == -signal.SIGTERM
        assert second.poll() == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_process_from_before_a_reboot_is_not_looked_for(tmp_path: Path) -> None:
    journal = new(tmp_path)
    entry = journal.begin("process", role="me, were it not for the boot")
    journal.commit(entry, pid=os.getppid(), boot="00000000-0000-0000-0000-000000000000")
    assert journal_undo.undo(journal) == []


def test_a_child_dies_with_its_parent_and_before_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "go.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'src')!r})\n"
        "import os\n"
        "from kata import children\n"
        "from kata.journal import Journal\n"
        f"journal = Journal.create_dir({str(tmp_path / 'sandboxes')!r}, 'p', {{}})\n"
        "print(children.spawn(['/bin/sleep', '600'], journal, 'sleeper').pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    said = subprocess.run(
        [sys.executable, str(tmp_path / "go.py")], capture_output=True, text=True, check=False
    )
    pid = int(said.stdout)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    else:
        assert sysio.pidfd_wait(pidfd, 10)
        os.close(pidfd)
    report = reconcile(str(tmp_path), str(tmp_path / "state"))
    assert report.undone == [str(tmp_path / "sandboxes" / "p")]
    assert report.failures == []


def test_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    journal = new(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot execute /no/such"):
        children.spawn(["/no/such"], journal, "nothing")
    assert journal.entries[-1].gone


@needs_root
def test_a_way_back_from_a_childs_pid_namespace_that_is_barred(tmp_path: Path) -> None:
    """Nobody can cause that from outside; all further children would be in the first one's namespace."""
    (tmp_path / "go.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'src')!r})\n"
        "import os\n"
        "from kata import children, sysio\n"
        "from kata.journal import Journal\n"
        f"journal = Journal.create_dir({str(tmp_path / 'sandboxes')!r}, 'p', {{}})\n"
        "def barred(fd, kind=0): raise PermissionError(1, 'Operation not permitted')\n"
        "sysio.setns = barred\n"
        "try: children.spawn(['/bin/sleep', '600'], journal, 'sleeper', namespaces=sysio.CLONE_NEWPID)\n"
        "except OSError as error: print(error.strerror)\n"
        "print(journal.entries[-1].gone)\n"
        "try: os.waitpid(-1, 0)\n"
        "except ChildProcessError: print('no child')\n"
    )
    said = subprocess.run(
        [sys.executable, str(tmp_path / "go.py")], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.splitlines() == [
        "cannot go back to its own PID namespace: Operation not permitted",
        "True",
        "no child",
    ]


def test_reconcile_leaves_the_living_and_the_kept(tmp_path: Path) -> None:
    alive, dead, kept = new(tmp_path, "alive"), new(tmp_path, "dead"), new(tmp_path, "kept")
    kept.retain("witness")
    (tmp_path / "sandboxes" / "kept" / "witness").write_text("x")
    for journal in (dead, kept):
        orphan(journal)
    (tmp_path / "sandboxes" / "stranger").mkdir()
    unfinished = tmp_path / "sandboxes" / ".new-1-1-00000000-abcd"
    unfinished.mkdir()
    (unfinished / "journal").write_text("")
    me = process_identity(os.getpid())
    living = tmp_path / "sandboxes" / f".new-{me['pid']}-{me['start']}-{me['boot'][:8]}-abcd"
    living.mkdir()
    report = reconcile(str(tmp_path), str(tmp_path / "state"))
    assert sorted(report.undone) == [str(unfinished), str(tmp_path / "sandboxes" / "dead")]
    assert report.failures == []
    assert {os.path.basename(path) for path, _ in report.left} == {"alive", "kept", "stranger", living.name}
    assert journal_undo.undo(alive) == []


def _undone_but_for(path: str, calls: int) -> bool:
    """Undo in a child that dies of SIGKILL when it is about to change the disk once more; whether it got through."""
    pid = os.fork()
    if pid == 0:
        journal = Journal.open(path)
        left = calls

        def counted(real: Any) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*arguments, **more)

            return call

        for name in ("unlink", "rmdir", "rename", "write"):
            setattr(os, name, counted(getattr(os, name)))
        os._exit(bool(journal_undo.undo(journal)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_removal_that_is_cut_off_anywhere_is_finished(tmp_path: Path) -> None:
    calls, through = 0, False
    while not through:
        directory = tmp_path / "containers" / "c"
        journal = Journal.create_dir(str(tmp_path / "containers"), "c", {"kind": "container"})
        name = journal.begin("file", path=str(tmp_path / "name"))
        (tmp_path / "name").touch()
        journal.commit(name)
        for file in ("container.json", "rw.img", "log"):
            (directory / file).write_text("x")
        journal.retain("container.json")
        orphan(journal)
        through = _undone_but_for(journal.path, calls)
        report = reconcile(str(tmp_path / "run"), str(tmp_path))
        assert report.failures == []
        if calls == 0:  # killed before anything: it stays, and can be removed
            assert [reason for _, reason in report.left] == ["it is kept"]
            assert journal_undo.undo(Journal.open(journal.path)) == []
        assert os.listdir(tmp_path / "containers") == []
        assert not (tmp_path / "name").exists()
        calls += 1
    assert calls > 8


def test_what_a_power_failure_has_emptied_is_cleared(tmp_path: Path) -> None:
    for name, content in (("gone", None), ("empty", ""), ("whole", "{}")):
        journal = Journal.create_dir(str(tmp_path / "containers"), name, {"kind": "container"})
        journal.retain("container.json")
        orphan(journal)
        if content is not None:
            (tmp_path / "containers" / name / "container.json").write_text(content)
    reconcile(str(tmp_path / "run"), str(tmp_path))
    assert os.listdir(tmp_path / "containers") == ["whole"]


@needs_root
def test_mounts_are_undone_by_identity(tmp_path: Path) -> None:
    journal = new(tmp_path)
    target = tmp_path / "sandboxes" / "a" / "mnt"
    journal.make_directory(str(target))
    journal.make_mount("kata-test", str(target), "tmpfs", sysio.MS_NOSUID | sysio.MS_NODEV)
    (target / "file").write_text("x")
    busy = os.open(target / "file", os.O_RDONLY)
    assert journal_undo.undo(journal) == []
    os.close(busy)
    assert mount_table.mount_at(str(target)) is None
    assert not target.exists()


@needs_root
def test_a_foreign_mount_is_neither_undone_nor_crossed(tmp_path: Path) -> None:
    journal = new(tmp_path)
    tree, source = tmp_path / "tree", tmp_path / "source"
    source.mkdir()
    (source / "precious").write_text("x")
    journal.make_directory(str(tree))
    (tree / "mnt").mkdir()
    sysio.mount(str(source), str(tree / "mnt"), None, sysio.MS_BIND)
    try:
        failures = journal_undo.undo(journal)
        assert len(failures) == 1
        assert "something is mounted" in failures[0]
        assert (source / "precious").exists()
    finally:
        sysio.umount2(str(tree / "mnt"))
    assert journal_undo.undo(journal) == []
    assert not tree.exists()
    assert (source / "precious").exists()


@needs_root
def test_a_mount_point_with_an_odd_name_is_found_and_undone(tmp_path: Path) -> None:
    """In the kernel's list only spaces separate, and only newlines end a line."""
    target = tmp_path / "a\r b\x0bc\x85\td\n\\e\udcff"
    target.mkdir()
    journal = Journal.create(str(tmp_path / "journal"), {})
    journal.make_mount("", str(target), "tmpfs", sysio.MS_NOSUID | sysio.MS_NODEV)
    found = mount_table.mount_at(str(target))
    assert found is not None
    assert found.fstype == "tmpfs"
    assert journal_undo.undo(journal) == []
    assert mount_table.mount_at(str(target)) is None


@needs_root
def test_a_mount_without_identity(tmp_path: Path) -> None:
    journal = new(tmp_path)
    target = tmp_path / "mnt"
    target.mkdir()
    journal.begin("mount", target=str(target), source="kata-test-x", fstype="tmpfs")
    sysio.mount("kata-test-x", str(target), "tmpfs")
    assert journal_undo.undo(journal) == []
    assert mount_table.mount_at(str(target)) is None


@needs_root
def test_network_namespaces_and_taps(tmp_path: Path) -> None:
    name = f"ktest{os.urandom(3).hex()}"
    journal = new(tmp_path)
    entry = journal.begin("netns", path=f"/run/netns/{name}")
    subprocess.run(["ip", "netns", "add", name], check=True)
    journal.commit(entry)
    ip = ["ip", "-n", name]
    tap = journal.begin("tap", name="tap0", netns=f"/run/netns/{name}")
    if subprocess.run(
        [*ip, "tuntap", "add", "tap0", "mode", "tap"], capture_output=True, check=False
    ).returncode:
        journal.mark_gone(tap)  # no tun in this kernel
    else:
        shown = subprocess.run([*ip, "-j", "link", "show", "tap0"], capture_output=True, check=True)
        journal.commit(tap, ifindex=json.loads(shown.stdout)[0]["ifindex"])
        held = os.open(f"/run/netns/{name}", os.O_RDONLY)
        reverse = Journal.open(journal.path)
        for gone in reverse.entries[:1]:
            reverse.mark_gone(gone)  # only the tap, first
        assert [e.kind for e in reverse.entries if not e.gone] == ["tap"]
        os.close(held)
        assert journal_undo.undo(reverse) == []
        assert subprocess.run([*ip, "link", "show", "tap0"], capture_output=True, check=False).returncode
    journal = new(tmp_path, "b")
    entry = journal.begin("netns", path=f"/run/netns/{name}")
    journal.commit(entry)
    assert journal_undo.undo(journal) == []
    assert not os.path.exists(f"/run/netns/{name}")


@needs_root
@pytest.mark.parametrize("hidden", [False, True])
def test_cgroups_and_what_is_in_them(tmp_path: Path, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = next((m.target for m in mount_table.mounts() if m.fstype == "cgroup2"), None)
    if base is None:
        pytest.skip("needs a mounted cgroup v2 hierarchy")
    name = f"ktest-{os.urandom(3).hex()}"
    path = f"{base}/{name}"
    journal = new(tmp_path)
    entry = journal.begin("cgroup", path=path, inside=f"/{name}")
    os.mkdir(path)
    journal.commit(entry)
    if hidden:
        # As after an engine that had the hierarchy mounted for itself, on a host that has it nowhere.
        Path(journal.path).write_text(Path(journal.path).read_text().replace(f'"{path}"', f'"/gone/{name}"'))
        monkeypatch.setattr(mount_table, "mounts", lambda pid="self": [])
    os.mkdir(f"{path}/below")
    process = subprocess.Popen(["sleep", "600"])
    Path(f"{path}/below/cgroup.procs").write_text(str(process.pid))
    assert journal_undo.undo(journal) == []
    assert process.wait() == -signal.SIGKILL
    assert not os.path.exists(path)


def test_removed_files_can_be_held_until_their_space_may_be_freed(tmp_path: Path) -> None:
    journal = new(tmp_path)
    directory = Path(journal.path).parent
    (directory / "disk").write_bytes(bytes(1 << 16))
    (directory / "below").mkdir()
    (directory / "below" / "file").touch()
    (directory / "link").symlink_to("/etc/passwd")
    held: list[sysio.Fd] = []
    assert journal_undo.undo(journal, held=held) == []
    assert not directory.exists()
    assert [os.fstat(fd.raw).st_nlink for fd in held] == [0, 0, 0]
    for fd in held:
        fd.close()


def test_files_beyond_those_that_are_held_are_removed_all_the_same(tmp_path: Path) -> None:
    journal = new(tmp_path)
    directory = Path(journal.path).parent
    for number in range(journal_undo._MOST_HELD + 1):
        (directory / str(number)).touch()
    held: list[sysio.Fd] = []
    assert journal_undo.undo(journal, held=held) == []
    assert not directory.exists()
    assert len(held) == journal_undo._MOST_HELD
    for fd in held:
        fd.close()


def test_undo_keeps_the_journal_while_something_is_left(tmp_path: Path) -> None:
    journal = new(tmp_path)
    with open(journal.path, "a", encoding="ascii") as file:
        file.write('{"n":"x-1","intend":"spaceship","p":{"name":"Enterprise"}}\n')
    failures = journal_undo.undo(journal)
    assert failures == ["cannot undo spaceship Enterprise: this version does not know that kind"]
    assert os.path.exists(journal.path)
    report = reconcile(str(tmp_path), str(tmp_path / "state"))
    assert report.undone == []


def test_an_engine_clears_up_after_dead_ones_of_its_door_alone(tmp_path: Path) -> None:
    dead, living, foreign = (new(tmp_path, name) for name in ("dead", "living", "foreign"))
    orphan(dead)
    orphan(foreign)
    for journal in (dead, living, foreign):
        journal.close()
    base = tmp_path / "sandboxes"
    assert reconcile_sandboxes(str(base), "other").undone == []
    foreign_journal = base / "foreign/journal"
    foreign_journal.write_text(foreign_journal.read_text().replace('"client":"test"', '"client":"kata"'))
    report = reconcile_sandboxes(str(base), "test")
    assert (report.undone, report.failures) == ([str(base / "dead")], [])
    assert sorted(path.name for path in base.iterdir()) == ["foreign", "living"]


def test_a_directory_whose_journal_cannot_be_written_is_not_left_behind(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(JournalError, match="cannot write the journal"):
            Journal.create_dir(str(tmp_path / "containers"), "one", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "containers") == []


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_JSON, st.sampled_from([None, 1]), st.booleans())
def test_json_is_decoded_as_by_json(value: object, indent: int | None, escapes: bool) -> None:
    text = " \n" + json.dumps(value, indent=indent, ensure_ascii=escapes) + "\t\n"
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raw = json.dumps(value).encode()
    assert loads(text) == loads(raw) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", " ", "{", '{"a":}', "[1,]", "1 2", "nul", '"\x01"', b"\xff", "[1]x", '{"a" 1}']
)
def test_what_is_not_json_is_refused_in_the_words_of_json(text: str | bytes) -> None:
    def words(decode: Callable[[str | bytes], Any]) -> str:
        try:
            return f"accepted: {decode(text)!r}"
        except ValueError as error:
            return f"{type(error).__name__}: {error}"

    assert words(loads) == words(json.loads)
    assert not words(loads).startswith("accepted")


def test_json_of_constants_and_doubles_is_as_by_json() -> None:
    text = '{"a": Infinity, "b": -Infinity, "a": 1, "c": 1e400, "d": 12345678901234567890}'
    assert loads(text) == json.loads(text)
    assert repr(loads("NaN")) == "nan"
