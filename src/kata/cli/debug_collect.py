"""What `kata debug bundle` collects: of the node, and of one sandbox, running or not."""

from __future__ import annotations

import json
import os
import platform
import re
import time

from kata import paths
from kata.cli import debug_keep, records
from kata.cli.debug_archive import read_tail
from kata.cli.debug_keep import VALUE
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.debug_archive import Bundle
    from kata.cli.debug_keep import Masker
    from kata.cli.records import Container

_DOCUMENT = 1 << 20
_LOG = 4 << 20
_OUTPUT = 8 << 20
_CRASHES = 8
_EVENTS = 2000
_PROCESSES = 32
_DESCRIPTORS = 512
_CALL_S = 5.0
_CONSOLE_NAMES = ("console.log.1", "console.log")

_PROC_FILES = ("stat", "limits", "io", "schedstat", "wchan", "stack", "cgroup", "oom_score", "oom_score_adj")
_STATUS_LINES = debug_keep.words(
    "Name Umask State Tgid Pid PPid TracerPid Uid Gid FDSize NSpid VmPeak VmSize VmLck VmPin VmHWM VmRSS RssAnon"
    " RssFile"
    " RssShmem VmData VmStk VmExe VmLib VmPTE VmSwap HugetlbPages CoreDumping THP_enabled Threads SigQ SigPnd ShdPnd"
    " SigBlk SigIgn SigCgt CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Seccomp_filters Cpus_allowed_list"
    " Mems_allowed_list voluntary_ctxt_switches nonvoluntary_ctxt_switches"
)
_CGROUP_FILES = (
    *("memory.current", "memory.peak", "memory.max", "memory.high", "memory.events", "memory.stat", "memory.pressure"),
    *("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes", "memory.failcnt"),
    *("memory.oom_control", "cpu.stat", "cpu.max", "cpu.weight", "cpu.pressure", "cpu.shares", "cpu.cfs_quota_us"),
    *("cpu.cfs_period_us", "cpuacct.usage", "io.stat", "io.pressure", "pids.current", "pids.max", "pids.events"),
    *("cgroup.procs", "cgroup.events", "cgroup.controllers"),
)  # fmt: skip


class Subject:
    """What a bundle is about.

    Args:
        sandbox_id: Its id.
        directory: Its run directory, which need not exist any more.
        container: Its container, if it is one of the `kata` command.
    """

    def __init__(self, sandbox_id: str, directory: str, container: Container | None = None) -> None:
        self.sandbox_id = sandbox_id
        self.directory = directory
        self.container = container

    @property
    def socket(self) -> str:
        """The engine's socket, if there is one."""
        return os.path.join(self.directory, "engine.sock")

    @property
    def runs(self) -> bool:
        return os.path.exists(self.socket)


def find(reference: str) -> Subject | None:
    """A container of the `kata` command by name or id, or any client's sandbox by its id or the beginning of it.

    Raises:
        UsageError: Several sandboxes begin so.
    """
    from kata.errors import UsageError

    container = records.find_or_none(reference)
    if container is not None:
        return Subject(container.id, paths.sandbox_dir(container.id), container)
    if not reference or "/" in reference or reference.startswith("."):
        return None
    found = [subject for subject in sandboxes() if subject.sandbox_id.startswith(reference)]
    found += [
        one
        for one in sandboxes()
        if os.path.basename(one.directory) == reference and one.sandbox_id != reference
    ]
    exact = [one for one in found if reference in (one.sandbox_id, os.path.basename(one.directory))]
    chosen = exact or found
    if not chosen:
        from kata.cli.sandboxes import find as find_running
        from kata.errors import NotFoundError

        try:
            directory = find_running(reference)  # knows a pod's containers as well
        except NotFoundError:
            return None
        chosen = [one for one in sandboxes() if one.directory == directory]
    if len(chosen) > 1:
        names = ", ".join(sorted(os.path.basename(one.directory) for one in chosen))
        raise UsageError(f"{reference!r} is the beginning of several sandboxes", f"give one of: {names}")
    return chosen[0] if chosen else None


def sandboxes() -> list[Subject]:
    """All sandboxes that have a run directory, of whatever client."""
    base = os.path.join(paths.run_dir(), "sandboxes")
    try:
        names = sorted(os.listdir(base))
    except OSError:
        return []
    found = []
    for name in names:
        if name.startswith("."):
            continue
        directory = os.path.join(base, name)
        try:
            settings = json.loads(read_tail(os.path.join(directory, "sandbox.json"), _DOCUMENT)[0])
            identity = str(settings["id"])
        except (OSError, ValueError, KeyError, TypeError):
            identity = name
        found.append(Subject(identity, directory))
    return found


class Collector:
    """Puts things into a bundle; what cannot be had becomes a problem in its manifest, and the rest goes on.

    Args:
        bundle: The bundle.
        masker: The one that the bundle uses.
    """

    def __init__(self, bundle: Bundle, masker: Masker) -> None:
        self._bundle = bundle
        self._masker = masker

    def _try(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            # The report is about something that is broken: whatever is wrong with one part, the others are wanted.
            if isinstance(error, (FileNotFoundError, ProcessLookupError)):
                self._bundle.problem(what, "there is none")
            else:
                self._bundle.problem(what, error)

    def _document(self, name: str, path: str, rule: Any) -> None:
        """The part of a JSON file that a rule keeps."""
        data, cut = read_tail(path, _DOCUMENT)
        if cut:
            raise KataError(f"it is larger than {_DOCUMENT >> 20} MiB")
        self._bundle.add(name, self._masker.keep(json.loads(data), rule), path)

    def _text(self, name: str, path: str, limit: int = _LOG) -> None:
        data, cut = read_tail(path, limit)
        self._bundle.add(name, data.decode("utf-8", "backslashreplace"), path, "its end" if cut else "")

    # ---- the node ----

    def node(self) -> None:
        """What is not of one sandbox."""
        for name, value in os.environ.items():
            # None of it is included; but a message may quote it.
            if re.search("(?i)_proxy$|pass|secret|token|key|credential|auth", name):
                self._masker.forget(value)
        self._try("versions", self._versions)
        self._try("kata doctor", self._doctor)
        self._try("the configuration", self._configuration)
        self._try("the host", self._host)
        self._try("the list of sandboxes", self._list)
        self._try("reports of crashes", self._crashes)

    def _versions(self) -> None:
        from kata.cli import host

        found: dict[str, Any] = dict(host.versions())
        found["host kernel"] = f"{platform.system()} {platform.release()} {platform.machine()}"
        for name in ("containerd", "dockerd", "passt"):
            found[name] = host.version_of(name) or "not found"
        self._bundle.add("versions.json", self._masker.keep(found, {"*": VALUE}), "kata version")

    def _doctor(self) -> None:
        from kata.cli import host

        rows = [check.to_dict() for check in host.checks()]
        self._bundle.add("doctor.json", self._masker.keep(rows, [debug_keep.CHECK]), "kata doctor")

    def _configuration(self) -> None:
        from kata.config import files

        found = files.load()
        values = {name: [value, origin] for name, (value, origin) in found.values.items()}
        content = {
            "files": found.files,
            "set": self._masker.keep(values, debug_keep.CONFIGURATION),
            "notes": found.notes,
            "environment": {
                name: self._masker.keep(value, VALUE if name in debug_keep.ENVIRONMENT else {})
                for name, value in sorted(os.environ.items())
                if name.startswith("KATA_")
            },
        }
        self._bundle.add("configuration.json", content, "the files that it names, and the environment")

    def _host(self) -> None:
        facts: dict[str, Any] = {}
        for path in (
            "/proc/modules",
            "/proc/cpuinfo",
            "/proc/meminfo",
            "/proc/loadavg",
            "/proc/uptime",
            "/proc/pressure/memory",
            "/proc/pressure/cpu",
        ):
            try:
                facts[path] = read_proc(path).splitlines()
            except OSError:
                facts[path] = None
        model = [line for line in facts.pop("/proc/cpuinfo") or () if line.startswith("model name")]
        facts["processors"] = {
            "model": model[0].partition(":")[2].strip() if model else "",
            "count": os.cpu_count(),
        }
        names = ("/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net", "/dev/net/tun", "/dev/fuse")
        facts["devices"] = {name: os.path.exists(name) for name in names}
        modules = [line.partition(" ")[0] for line in facts.pop("/proc/modules") or ()]
        ours = ("kvm", "vhost", "vsock", "tun", "fuse", "act_")
        facts["modules"] = [name for name in modules if name.startswith(ours)]
        status = os.statvfs(paths.state_dir() if os.path.isdir(paths.state_dir()) else "/")
        facts["state_directory"] = {
            "free_bytes": status.f_bavail * status.f_frsize,
            "free_inodes": status.f_favail,
        }
        try:
            release = platform.freedesktop_os_release()
            facts["distribution"] = {
                key: release.get(key, "") for key in ("ID", "VERSION_ID", "PRETTY_NAME")
            }
        except OSError:
            facts["distribution"] = None
        self._bundle.add("host.json", self._masker.keep(facts, {"*": VALUE}), "/proc, statvfs(2)")

    def _list(self) -> None:
        mine = {
            one.id: {"id": one.id, "name": one.name, "state": one.state()}
            for one in records.all_containers()
        }
        rows = []
        for subject in sandboxes():
            rows.append({"id": subject.sandbox_id, "directory": subject.directory, "socket": subject.runs})
        rule = {
            "containers": [{"id": VALUE, "name": VALUE, "state": debug_keep.CONTAINER_STATE}],
            "sandboxes": [{"id": VALUE, "directory": VALUE, "socket": VALUE}],
        }
        listed = self._masker.keep({"containers": list(mine.values()), "sandboxes": rows}, rule)
        self._bundle.add("list.json", listed, "kata ps -a, and the directories of sandboxes")

    def _crashes(self) -> None:
        directory = os.path.join(paths.state_dir(), "crashes")
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(".txt"))[-_CRASHES:]
        except FileNotFoundError:
            return
        for number, name in enumerate(reversed(names), 1):
            self._text(f"crash-{number}.txt", os.path.join(directory, name), 64 << 10)

    # ---- one sandbox ----

    def sandbox(self, subject: Subject, *, with_output: bool) -> None:
        """Everything about one sandbox.

        Args:
            subject: Which.
            with_output: Include what its containers have written, and all of the guest's console.
        """
        if subject.container is not None:
            self._record(subject.container.directory, with_output)
        directory = subject.directory
        if not os.path.isdir(directory):
            self._bundle.problem("the sandbox", "it does not run: its engine, console and log are gone")
        else:
            path = os.path.join(directory, "sandbox.json")
            self._try("the sandbox's settings", self._document, "sandbox.json", path, debug_keep.SANDBOX)
            if subject.runs:
                self._try("what the engine says", self._engine, subject)
                self._try("the sandbox's figures", self._state, directory)
            path = os.path.join(directory, "journal")
            self._try("the journal", self._journal, "journal.json", path)
            self._try("the processes", self._processes, path)
            for name in ("engine.log.1", "engine.log"):
                path = os.path.join(directory, name)
                if name == "engine.log" or os.path.lexists(path):
                    self._try("the engine's log", self._text, name, path)
            self._try("the guest's console", self._console, directory, with_output)
            self._try("the hypervisor's arguments", self._arguments, directory)
        self._try("the events", self._events, subject)

    def _record(self, directory: str, with_output: bool) -> None:
        for name, rule in (
            ("container.json", debug_keep.RECORD),
            ("config.json", debug_keep.SPECIFICATION),
            ("state.json", debug_keep.CONTAINER_STATE),
        ):
            path = os.path.join(directory, name)
            if name != "state.json" or os.path.lexists(path):  # not before it has been started
                self._try(f"the container's {name}", self._document, name, path, rule)
        path = os.path.join(directory, "journal")
        self._try("the container's journal", self._journal, "container-journal.json", path)
        for name in ("log.1", "log") if with_output else ():
            path = os.path.join(directory, name)
            if os.path.lexists(path):
                self._try("the container's output", self._text, f"output-{name}.txt", path, _OUTPUT)

    def _engine(self, subject: Subject) -> None:
        from kata.engine.client import SANDBOX, EngineClient
        from kata.proto import sandbox_pb

        with EngineClient(subject.socket) as engine:
            answer = engine.call(
                SANDBOX, "Describe", sandbox_pb.DescribeRequest(), sandbox_pb.DescribeResponse, _CALL_S * 2
            )
            description: dict[str, Any] = json.loads(answer.json)
            kept = self._masker.keep(description, debug_keep.DESCRIPTION)
            self._bundle.add("description.json", kept, "the engine")
            timings = engine.call(
                SANDBOX, "Timings", sandbox_pb.TimingsRequest(), sandbox_pb.TimingsResponse, _CALL_S
            ).timings
            rows = [
                {
                    "name": one.name,
                    "start_ns": one.start_ns,
                    "duration_ns": one.duration_ns,
                    "part_of": one.part_of,
                }
                for one in timings
            ]
            self._bundle.add("timings.json", self._masker.keep(rows, [{"*": VALUE}]), "the engine")
            if subject.container is None:
                for number, identity in enumerate(sorted(description.get("containers") or ())):
                    path = os.path.join(engine.state(identity, timeout=_CALL_S).bundle, "config.json")
                    name = f"config-{number}.json"
                    self._try(
                        f"the specification of {identity}",
                        self._document,
                        name,
                        path,
                        debug_keep.SPECIFICATION,
                    )
        self._try("the cgroups", self._cgroups, description.get("host_cgroups") or {})

    def _state(self, directory: str) -> None:
        """The engine's state document."""
        from kata import management

        path = os.path.join(directory, paths.MANAGEMENT_SOCKET)
        status, _, content = management.get(path, "/kata/v1/state", _CALL_S * 2)
        if status != 200:
            raise KataError(f"the engine answered with {status}")
        kept = self._masker.keep(json.loads(content), debug_keep.STATE)
        self._bundle.add("figures.json", kept, "the engine: /kata/v1/state")

    def _cgroups(self, places: dict[str, str]) -> None:
        figures: dict[str, Any] = {}
        for path in sorted(set(places.values())):
            inside = {}
            for name in _CGROUP_FILES:
                try:
                    inside[name] = read_proc(os.path.join(path, name)).splitlines()
                except OSError:
                    continue  # every version and controller has some of them
            figures[path] = inside
        self._bundle.add("cgroups.json", self._masker.keep(figures, {"*": VALUE}), "the host's cgroups")

    def _journal(self, name: str, path: str) -> None:
        data, cut = read_tail(path, _DOCUMENT)
        rows = []
        for line in data.decode("utf-8", "backslashreplace").splitlines()[1 if cut else 0 :]:
            try:
                rows.append(self._masker.keep(json.loads(line), debug_keep.JOURNAL))
            except ValueError:
                rows.append({"torn": len(line)})
        self._bundle.add(name, rows, path, "its end" if cut else "")

    def _console(self, directory: str, with_output: bool) -> None:
        text, source = "", ""
        for name in _CONSOLE_NAMES:
            path = os.path.join(directory, name)
            if os.path.exists(path):
                text += read_tail(path, _DOCUMENT)[0].decode("utf-8", "backslashreplace")
                source = path
        if not source:
            raise FileNotFoundError
        note = ""
        if not with_output:
            text = "".join(map(of_kernel_or_agent, text.replace("\r\n", "\n").splitlines(keepends=True)))
            note = "lines of the kernel and the agent alone"
        self._bundle.add("console.log", text, source, note)

    def _arguments(self, directory: str) -> None:
        """What the hypervisor was started with."""
        from kata.hypervisor import registry

        settings = json.loads(read_tail(os.path.join(directory, "sandbox.json"), _DOCUMENT)[0])
        name = str(((settings.get("machine") or {}).get("hypervisor") or {}).get("name") or "")
        shown = []
        for word, kind in registry.find(name).arguments(directory):
            if kind == "parameters":
                shown.append(self._masker.parameters(word))
            else:
                shown.append(word if kind == "plain" else self._masker.keep(word, {}))
        self._bundle.add("hypervisor.args.txt", "\n".join(shown) + "\n", "the hypervisor", "one a line")

    def _processes(self, path: str) -> None:
        """What the kernel says of the engine and its helpers, which the journal names."""
        from kata import sysio

        found: dict[int, tuple[str, int]] = {}
        roles: dict[str, str] = {}
        for line in read_tail(path, _DOCUMENT)[0].splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "owner" in entry:
                found[int(entry["owner"]["pid"])] = ("engine", int(entry["owner"]["start"]))
            elif entry.get("intend") == "process":
                roles[entry["n"]] = str(entry["p"].get("role", ""))
            elif "made" in entry and entry.get("n") in roles:
                found[int(entry["made"]["pid"])] = (roles[entry["n"]], int(entry["made"]["start"]))
        rows = []
        for pid, (role, start) in list(found.items())[:_PROCESSES]:
            if sysio.proc_starttime(pid) == start:
                rows.append({"pid": pid, "role": role, **process_facts(pid)})
        self._bundle.add("processes.json", self._masker.keep(rows, [{"*": VALUE}]), "/proc")

    def _events(self, subject: Subject) -> None:
        base = os.path.join(paths.run_dir(), "events.jsonl")
        rows: list[Any] = []
        for path in (f"{base}.1", base):
            try:
                lines = read_tail(path, 2 << 20)[0].splitlines()
            except FileNotFoundError:
                continue
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and event.get("sandbox") == subject.sandbox_id:
                    rows.append(self._masker.keep(event, debug_keep.EVENT))
        if rows:
            self._bundle.add("events.json", rows[-_EVENTS:], base)


def read_proc(path: str) -> str:
    """A file of /proc or of a cgroup: at most 256 KiB of it."""
    with open(path, "rb") as file:
        return file.read(256 << 10).decode("utf-8", "backslashreplace")


def process_facts(pid: int) -> dict[str, Any]:
    """What the kernel says of a process: neither its environment nor its arguments."""
    base = f"/proc/{pid}"
    facts: dict[str, Any] = {"looked_at": time.time()}
    try:
        status = read_proc(f"{base}/status").splitlines()
    except OSError:
        return {"gone": True}
    facts["status"] = [line for line in status if line.partition(":")[0] in _STATUS_LINES]
    for name in _PROC_FILES:
        try:
            facts[name] = read_proc(f"{base}/{name}").splitlines()
        except OSError as error:
            facts[name] = error.strerror
    try:
        facts["exe"] = os.readlink(f"{base}/exe")
        numbers = sorted(os.listdir(f"{base}/fd"), key=int)
        facts["descriptors"] = {"count": len(numbers)}
        for number in numbers[:_DESCRIPTORS]:
            try:
                facts["descriptors"][number] = os.readlink(f"{base}/fd/{number}")
            except OSError:
                continue
        facts["threads"] = {}
        for thread in sorted(os.listdir(f"{base}/task"), key=int)[:_DESCRIPTORS]:
            facts["threads"][thread] = [
                read_proc(f"{base}/task/{thread}/comm").strip(),
                read_proc(f"{base}/task/{thread}/wchan"),
            ]
    except OSError as error:
        facts["problem"] = error.strerror
    return facts


def of_kernel_or_agent(line: str) -> str:
    """A line of the guest's console, if the kernel or the agent has the form of it; otherwise how long it was."""
    text = line.strip("\r\n\0 ")
    if re.match(r"\[ *\d+\.\d{6}\]", text) or (
        text.startswith('{"ts":') and text.endswith("}") and '"source":"agent"' in text
    ):
        return line
    return f"<a line of {len(text)} characters, neither the kernel's nor the agent's>\n" if text else "\n"
