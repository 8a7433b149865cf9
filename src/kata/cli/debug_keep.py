"""What `kata debug bundle` keeps of files and documents that may hold secrets.

Twofold. Of structured documents only what is listed here is kept (an allow list): everything else is replaced, and what
was replaced is remembered. Then every text of the bundle, logs included, has the remembered values taken out wherever
they occur, and what looks like a credential: passwords in URLs, bearer tokens, private keys.
"""

from __future__ import annotations

import json
import re
import urllib.parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

REMOVED = "<removed>"
_LEAST = 6
"""Values shorter than this (in characters) are removed where they stand and not searched for elsewhere."""
_MOST_VALUES = 20_000
_HEAD = 4
"""Characters of a value by which it is looked for; no value that is looked for is shorter."""
_FEW = 32
_MOST_LENGTH = 64 << 10


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_ORDINARY = words(
    "container sandbox default linux running created stopped systemd enabled disabled always never"
)
"""Words that occur everywhere, also as values of labels and arguments."""


class Keep:
    """How one place of a document is treated; the rules are written with these.

    A rule is one of these, or a dict (of an object: key -> rule; keys that it does not name are removed; ``"*"`` names
    all others), or a list with one rule (of each item of a list).
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


VALUE = Keep("VALUE")
"""A scalar, or a list of them, is kept."""
NAMES = Keep("NAMES")
"""Of an object its keys are kept; of a list of ``NAME=VALUE`` the names."""
COUNT = Keep("COUNT")
"""How many there are is kept."""
FLAGS = Keep("FLAGS")
"""Of a list of mount options, those that are known to be harmless are kept, and the names of the others."""
PARAMETERS = Keep("PARAMETERS")
"""Of a kernel's command line, known parameters are kept, and the names of others."""
FIRST = Keep("FIRST")
"""Of a list its first item is kept."""
CONFIGURATION = Keep("CONFIGURATION")
"""Of an object of a configuration's keys, each with a list of its value and its origin: see `CONFIGURATION_TEXTS`."""

_KERNEL_PARAMETERS = words(
    "console quiet panic reboot loglevel debug earlyprintk earlycon nr_cpus maxcpus no_timer_check noapic acpi pci"
    " pcie_ports noreplace-smp tsc clocksource lpj random.trust_cpu random.trust_bootloader mitigations nokaslr nosmp"
    " iommu cgroup_no_v1 systemd.unified_cgroup_hierarchy virtio_fs.bounce page_reporting.page_reporting_order rcupdate"
    " rcu_nocbs idle nowatchdog transparent_hugepage init rdinit root rootfstype ro rw selinux apparmor audit ipv6"
    " agent.log agent.debug_console agent.debug_console_vport agent.log_vport agent.trace agent.container_pipe_size"
    " agent.hotplug_timeout agent.pci_scan agent.server_addr agent.unified_cgroup_hierarchy agent.cdh_api_timeout"
    " agent.channel agent.dial agent.features kata.agent_channel"
)
_MOUNT_OPTIONS = words(
    "ro rw bind rbind private rprivate shared rshared slave rslave unbindable runbindable nosuid suid nodev dev noexec"
    " exec sync async dirsync relatime norelatime noatime atime nodiratime strictatime remount rro rrw size mode uid"
    " gid nr_inodes newinstance ptmxmode tmpcopyup discard"
)
_SPEC_MEMORY = {"*": VALUE}

ENVIRONMENT = words(
    "KATA_RUN_DIR KATA_STATE_DIR KATA_GUEST_DIR KATA_CACHE_DIR KATA_AGENT_BINARY KATA_CONF_FILE KATA_VC_DIR"
    " KATA_INSPECTOR_BINARY KATA_GUEST_EXTENSIONS KATA_LOG_FORMAT KATA_LOG_LEVEL"
)
"""Variables of our own that name places: kept with their values; of all others that begin with KATA_, the name."""

CONFIGURATION_TEXTS = words(
    "hypervisor.machine_type hypervisor.seccompsandbox hypervisor.shared_fs hypervisor.virtio_fs_cache"
    " hypervisor.accelerator hypervisor.cpu_features hypervisor.enable_annotations hypervisor.valid_hypervisor_paths"
    " hypervisor.valid_virtio_fs_daemon_paths hypervisor.valid_entropy_sources hypervisor.valid_kernel_paths"
    " hypervisor.valid_initrd_paths hypervisor.valid_firmware_paths runtime.internetworking_model"
    " runtime.hypervisor_name runtime.agent_name runtime.log_level runtime.vfio_mode runtime.emptydir_mode"
    " runtime.log_format agent.guest_extensions"
)
"""Keys of the configuration whose texts are kept; numbers, switches and paths always are."""

_DISK = {"path": VALUE, "readonly": VALUE, "serial": VALUE, "ephemeral": VALUE, "slot": VALUE, "name": VALUE}
_PORT = {"host_port": VALUE, "guest_port": VALUE, "host_ip": VALUE, "proto": VALUE}
_ENDPOINT = {
    "network": VALUE,
    "path": VALUE,
    "namespace": VALUE,
    "address": VALUE,
    "prefix": VALUE,
    "address6": VALUE,
    "prefix6": VALUE,
    "mac": VALUE,
    "names": COUNT,
}
_NETWORK = {
    "mode": VALUE,
    "ports": [_PORT],
    "dns": VALUE,
    "path": VALUE,
    "model": VALUE,
    "endpoints": [_ENDPOINT],
    "outside": VALUE,
    "stays_empty": VALUE,
}
_VOLUME = {
    "volume": VALUE,
    "stays": VALUE,
    "source": VALUE,
    "destination": VALUE,
    "readonly": VALUE,
    "name": VALUE,
    "slot": VALUE,
    "copy": VALUE,
}
_SIZE = {
    "vcpus": VALUE, "memory_mib": VALUE, "max_vcpus": VALUE, "max_memory_mib": VALUE, "fixed_memory": VALUE,
    "default_memory_mib": VALUE, "kernel": VALUE, "asked_cpus": VALUE, "asked_memory": VALUE, "asked_by": VALUE,
}  # fmt: skip
SANDBOX: Mapping[str, Any] = {
    "id": VALUE,
    "client": {
        "name": VALUE, "idle_s": VALUE, "keeps_ended_containers": VALUE, "ends_when_stale": VALUE,
        "sweeps_dead_engines": VALUE, "ends_with_init": VALUE, "holds_fifos": VALUE, "makes_etc_files": VALUE,
        "foreign_specs": VALUE, "keeps_host_mounts": VALUE, "shares_from_start": VALUE, "recursive_readonly": VALUE,
        "signal_s": VALUE, "late_signals_fail": VALUE, "host_shaped_stats": VALUE, "all_controllers": VALUE,
        "namespace": VALUE, "events_address": VALUE, "log_fifo": VALUE,
    },
    "machine": {
        "hypervisor": {
            "accel": VALUE, "name": VALUE, "console": VALUE, "prealloc": VALUE, "huge_pages": VALUE, "ksm": VALUE,
            "reclaim": VALUE, "templates": VALUE, "template_path": VALUE, "vhost_user_store": VALUE,
            "map_images": VALUE,
            "pool": VALUE, "pool_free_mib": VALUE,
            "options": {"path": VALUE, "machine_type": VALUE, "cpu_features": VALUE, "firmware": VALUE,
                        "entropy_source": VALUE, "sandbox": VALUE},
        },
        "guest": {
            "kernel": VALUE, "initrd": VALUE, "extensions": VALUE, "kernel_version": VALUE, "bounces": VALUE,
            "scans_ports": VALUE, "cmdline": PARAMETERS, "verbose": VALUE, "modules": [FIRST], "no_seccomp": VALUE,
            "ready_s": VALUE, "create_s": VALUE,
        },
        "size": _SIZE,
        "share": {"disabled": VALUE, "protocol": VALUE, "daemon": VALUE, "cache": VALUE, "msize": VALUE},
        "snapshots": {"upper_layer": VALUE, "upper_mib": VALUE, "images_mib": VALUE},
        "configuration": CONFIGURATION,
        "tracing": {"agent": VALUE, "config": VALUE},
        "engine_parent": VALUE, "log_format": VALUE,
        "log_level": VALUE,
    },
    "pod": {"config_path": VALUE},
    "container": {
        "directory": VALUE,
        "rootfs": {"kind": VALUE, "lower_slot": VALUE, "source": VALUE, "upper": VALUE, "upper_slot": VALUE},
        "volumes": [_VOLUME], "disk_volumes": [_VOLUME],
        "log": {"path": VALUE, "max_bytes": VALUE, "files": VALUE},
        "open_stdin": VALUE, "stdin_once": VALUE, "record_state": VALUE, "auto_remove": VALUE,
        "health": {"command": COUNT, "interval_s": VALUE, "timeout_s": VALUE, "start_period_s": VALUE,
                   "retries": VALUE},
        "extra_hosts": COUNT, "dns_servers": COUNT, "dns_searches": COUNT, "dns_options": VALUE,
    },
    "network": _NETWORK,
    "disks": [_DISK],
    "host_devices": VALUE,
    "all_disk_slots": VALUE, "hostname": VALUE, "resolv_conf": COUNT, "sysctls": NAMES, "cgroups_path": VALUE,
    "oom_score_adj": VALUE, "notes": VALUE, "request_started_ns": VALUE, "launched_ns": VALUE,
    "not_forked": VALUE,
    "not_taken": VALUE,
}  # fmt: skip
"""Of ``sandbox.json`` (`kata.settings`)."""

SPECIFICATION: Mapping[str, Any] = {
    "ociVersion": VALUE,
    "hostname": VALUE,
    "process": {
        "terminal": VALUE, "user": {"uid": VALUE, "gid": VALUE, "umask": VALUE, "additionalGids": VALUE,
                 "additionalGroups": COUNT},
        "args": COUNT, "env": NAMES, "cwd": VALUE, "capabilities": {"*": VALUE},
        "rlimits": [{"type": VALUE, "hard": VALUE, "soft": VALUE}],
        "noNewPrivileges": VALUE, "apparmorProfile": VALUE, "oomScoreAdj": VALUE, "ioPriority": {"*": VALUE},
    },
    "root": {"path": VALUE, "readonly": VALUE},
    "mounts": [{"destination": VALUE, "type": VALUE, "source": VALUE, "options": FLAGS}],
    "hooks": {"*": [{"path": VALUE, "args": COUNT, "env": NAMES, "timeout": VALUE}]},
    "annotations": NAMES,
    "linux": {
        "namespaces": [{"type": VALUE, "path": VALUE}],
        "devices": [{"path": VALUE, "type": VALUE, "major": VALUE, "minor": VALUE, "fileMode": VALUE}],
        "resources": {
            "memory": _SPEC_MEMORY, "cpu": {"*": VALUE}, "pids": {"*": VALUE},
            "devices": [{"allow": VALUE, "type": VALUE, "major": VALUE, "minor": VALUE, "access": VALUE}],
            "hugepageLimits": [{"pageSize": VALUE, "limit": VALUE}], "unified": NAMES,
        },
        "cgroupsPath": VALUE, "rootfsPropagation": VALUE, "maskedPaths": VALUE, "readonlyPaths": VALUE,
        "sysctl": NAMES, "mountLabel": VALUE, "uidMappings": [{"*": VALUE}], "gidMappings": [{"*": VALUE}],
        "seccomp": {"defaultAction": VALUE, "architectures": VALUE, "flags": VALUE, "syscalls": COUNT},
    },
}  # fmt: skip
"""Of a container's ``config.json`` (OCI runtime specification)."""

RECORD: Mapping[str, Any] = {
    "id": VALUE, "name": VALUE, "created_at": VALUE, "hostname": VALUE, "tty": VALUE, "open_stdin": VALUE,
    "stdin_once": VALUE, "network": VALUE, "ports": [_PORT], "publish_all": VALUE,
    "devices": [{"source": VALUE, "path": VALUE, "access": VALUE}],
    "networks": [{"network": VALUE, "address": VALUE, "mac": VALUE, "aliases": COUNT}],
    "upper": VALUE, "cpus": VALUE, "memory": VALUE,
    "hypervisor": VALUE,
    "image": {"reference": VALUE, "digest": VALUE, "id": VALUE, "kind": VALUE},
    "rootfs": {"kind": VALUE, "path": VALUE, "source": VALUE},
    "volumes": [_VOLUME], "disk_volumes": [_VOLUME], "image_volumes": VALUE,
    "auto_remove": VALUE, "made_to_run": VALUE, "stop_signal": VALUE, "labels": NAMES, "annotations": NAMES,
    "args": COUNT, "env": NAMES, "log": {"max_bytes": VALUE, "files": VALUE}, "stop_timeout": VALUE,
    "extra_hosts": COUNT, "dns_servers": COUNT, "dns_searches": COUNT, "dns_options": VALUE,
    "expose": VALUE,
}  # fmt: skip
"""Of ``container.json`` (`kata.cli.records`)."""

CONTAINER_STATE: Mapping[str, Any] = {
    "status": VALUE, "started_at": VALUE, "finished_at": VALUE, "exit_code": VALUE, "oom_killed": VALUE,
    "error": VALUE, "pid": VALUE, "engine": {"pid": VALUE, "starttime": VALUE, "boot_id": VALUE},
    "timings": VALUE,
}  # fmt: skip
"""Of a container's ``state.json``."""

_FIGURES = {"*": VALUE}
STATE: Mapping[str, Any] = {
    "time": VALUE, "id": VALUE, "client": VALUE, "namespace": VALUE, "state": VALUE, "error": VALUE, "created": VALUE,
    "name": VALUE, "labels": NAMES, "hypervisor": _FIGURES, "vcpus": VALUE, "memory_bytes": VALUE,
    "host": {"cpu_seconds": VALUE, "memory_bytes": VALUE, "processes": [_FIGURES]},
    "guest": _FIGURES, "overhead": _FIGURES, "network": [_FIGURES],
    "containers": [{
        "id": VALUE, "name": VALUE, "image": VALUE, "state": VALUE, "created": VALUE, "started": VALUE, "pid": VALUE,
        "exit_code": VALUE, "oom_kills": VALUE, "cpu_seconds": VALUE, "throttled_seconds": VALUE,
        "throttled_periods": VALUE, "memory_bytes": VALUE, "memory_limit_bytes": VALUE, "pids": VALUE,
        "read_bytes": VALUE, "written_bytes": VALUE, "labels": NAMES,
    }],
    "start": {"path": VALUE, "reason": VALUE},
    "timings": [_FIGURES],
}  # fmt: skip
"""Of the engine's state document (``/kata/v1/state``)."""

DESCRIPTION: Mapping[str, Any] = {
    "id": VALUE, "client": VALUE, "engine_pid": VALUE, "hypervisor": {"*": VALUE}, "hypervisor_pid": VALUE,
    "accelerator": VALUE, "agent_channel": VALUE, "kernel": VALUE, "initrd": VALUE, "host_cgroups": {"*": VALUE},
    "vcpus": VALUE, "memory_mib": VALUE, "sizing": {"*": VALUE}, "configuration": CONFIGURATION, "disks": [_DISK],
    "volumes": [_VOLUME], "network": _NETWORK, "state": VALUE, "error": VALUE, "disk_error": VALUE,
    "disk_errors": VALUE, "start": {"path": VALUE, "reason": VALUE, "steps": [_FIGURES]},
    "containers": {"*": {"state": VALUE, "error": VALUE, "oom_killed": VALUE, "execs": {"*": VALUE}}},
    "hypervisor_usage": {"*": VALUE},
    "agent": {"version": VALUE, "extra_features": VALUE, "storage_handlers": VALUE, "seccomp": VALUE, "error": VALUE},
}  # fmt: skip
"""Of what an engine says of its sandbox (`kata.engine.services.sandbox_service.describe`)."""

JOURNAL: Mapping[str, Any] = {
    "journal": VALUE, "meta": {"client": VALUE, "kind": VALUE, "id": VALUE}, "own_dir": VALUE, "durable": VALUE,
    "owner": _FIGURES, "n": VALUE, "intend": VALUE, "gone": VALUE, "keep": VALUE, "while": VALUE,
    "p": {
        "path": VALUE, "role": VALUE, "signal": VALUE, "target": VALUE, "source": VALUE, "fstype": VALUE,
        "name": VALUE, "netns": VALUE, "inside": VALUE, "parents": VALUE,
    },
    "made": {"*": VALUE},
}  # fmt: skip
"""Of a line of a journal (`kata.journal`)."""

EVENT: Mapping[str, Any] = {
    "time": VALUE, "event": VALUE, "sandbox": VALUE, "container": VALUE, "client": VALUE, "namespace": VALUE,
    "exec": VALUE, "exec_id": VALUE, "pid": VALUE, "exit_code": VALUE, "oom_killed": VALUE, "reason": VALUE,
    "error": VALUE, "vcpus": VALUE, "memory_mib": VALUE, "memory_bytes": VALUE, "disk": VALUE,
    "duration_seconds": VALUE,
}  # fmt: skip
"""Of a line of the node's events (`kata.events`)."""

CHECK: Mapping[str, Any] = {
    "name": VALUE, "result": VALUE, "text": VALUE, "hint": VALUE, "blocking": VALUE
}  # fmt: skip
"""Of a check of `kata doctor`."""


class Masker:
    """Keeps what the rules allow, remembers what they do not, and takes that out of texts."""

    def __init__(self) -> None:
        self._secret: set[str] = set()
        self._shown: set[str] = set()
        self._forms: list[str] | None = None
        self._by_head: dict[str, dict[int, set[str]]] = {}

    # ---- documents ----

    def keep(self, value: Any, rule: Any) -> Any:
        """The part of a document of JSON values that a rule allows, in the same form.

        Args:
            value: The document.
            rule: What of it is kept, in the form that this module's rules have.
        """
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                return None if value is None else self._remove(value)
            other = rule.get("*")
            return {
                str(key): self.keep(one, rule.get(key, other)) if rule.get(key, other) else self._remove(one)
                for key, one in value.items()
            }
        if isinstance(rule, list):
            if not isinstance(value, list):
                return None if value is None else self._remove(value)
            return [self.keep(one, rule[0]) for one in value]
        if rule is NAMES:
            return self._names(value)
        if rule is COUNT:
            count = len(value) if isinstance(value, (list, dict)) else 1
            self._remove(value)
            return f"<{count} removed>"
        if rule is FLAGS:
            return [self._setting(str(one), ("=",), _MOUNT_OPTIONS) for one in value or ()]
        if rule is PARAMETERS:
            return self.parameters(str(value))
        if rule is FIRST and isinstance(value, list) and value:
            return [self._shown_value(value[0]), *(self._remove(one) for one in value[1:])]
        if rule is CONFIGURATION and isinstance(value, dict):
            return {str(name): self._configured(str(name), one) for name, one in value.items()}
        return self._shown_value(value)

    def _shown_value(self, value: Any) -> Any:
        """A scalar, or lists and objects of scalars three levels deep, as they are."""
        if isinstance(value, str):
            self._shown.add(value)
            self._of_url(value)
            return value
        if isinstance(value, list):
            return [self._shown_value(one) for one in value]
        if isinstance(value, dict):
            return {str(key): self._shown_value(one) for key, one in value.items()}
        return value

    def _names(self, value: Any) -> Any:
        if isinstance(value, dict):
            for one in value.values():
                self._remove(one)
            return dict.fromkeys(map(str, value), REMOVED)
        if isinstance(value, list):
            return [self._setting(str(one), ("=",), frozenset()) for one in value]
        return None if value is None else self._remove(value)

    def _configured(self, name: str, row: Any) -> Any:
        """One key of the configuration: its value, if it may be shown, and its origin."""
        from kata.config import keys

        value, origin = (row[0], row[1]) if isinstance(row, (list, tuple)) and len(row) == 2 else (row, "")
        key = keys.KEYS.get(name)
        if name == "hypervisor.kernel_params":
            return [self.parameters(str(value)), origin]
        plain = key is not None and (
            key.kind in (keys.BOOL, keys.INT, keys.NUMBER, keys.PATH) or key.choices
        )
        if plain or name in CONFIGURATION_TEXTS:
            return [self._shown_value(value), origin]
        return [self._remove(value), origin]

    def _setting(self, text: str, separators: Iterable[str], known: frozenset[str]) -> str:
        """``NAME=VALUE`` with its value if the name is a known one, otherwise the name alone."""
        for separator in separators:
            name, equals, value = text.partition(separator)
            if name in known:
                return text
            if equals:
                self._remove(value)
                return f"{name}{separator}{REMOVED}"
        self._remove(text)
        return REMOVED

    def parameters(self, text: str) -> str:
        """A kernel's command line with the values of those parameters that are known."""
        return " ".join(self._setting(one, ("=",), _KERNEL_PARAMETERS) for one in text.split())

    def _remove(self, value: Any) -> str:
        if isinstance(value, dict):
            for one in value.values():
                self._remove(one)
        elif isinstance(value, (list, tuple)):
            for one in value:
                self._remove(one)
        elif isinstance(value, str):
            self.forget(value)
        return REMOVED

    # ---- texts ----

    def forget(self, value: str) -> None:
        """Take a value, and the parts of it that may be secret by themselves, out of all texts."""
        value = value[:_MOST_LENGTH]
        parts = {value, *value.splitlines()}
        if len(value.split()) > 1 or "=" in value:
            parts |= {
                word
                for word in re.split(r"[\s'\"=,;&?()<>|]+", value)
                if len(word) >= 12 and re.search("[0-9]", word) and re.search("[A-Za-z]", word)
            }
            parts.add(value.partition("=")[2])
        for part in parts:
            self._add(part.strip())
        self._of_url(value)

    def _of_url(self, text: str) -> None:
        for found in re.finditer(r"://([^\s/?#]{1,512})@", text):
            user = found[1]
            for part in (user, *user.split(":", 1)):
                self._add(part, least=4)
                self._add(urllib.parse.unquote(part), least=4)

    def _add(self, part: str, least: int = _LEAST) -> None:
        if len(part) < least or part in _ORDINARY or len(self._secret) >= _MOST_VALUES:
            return
        if part.isdigit() and len(part) < 10:
            return  # it would be found in every figure
        self._secret.add(part)
        self._forms = None

    def text(self, text: str) -> str:
        """*text* without what has been removed elsewhere, and without what looks like a credential."""
        if self._forms is None:
            self._forms = self._all_forms()
            self._by_head = {}
            for form in self._forms:
                self._by_head.setdefault(form[:_HEAD], {}).setdefault(len(form), set()).add(form)
        if len(self._forms) <= _FEW:
            for form in self._forms:
                text = text.replace(form, REMOVED)
        else:
            text = self._without(text)
        for pattern, replacement in _CREDENTIALS:
            text = pattern.sub(replacement, text)
        return text

    def _without(self, text: str) -> str:
        """*text* without any of many values: by their beginnings and lengths, so that their number does not count."""
        pieces: list[str] = []
        last = position = 0
        heads = self._by_head
        end = len(text) - _HEAD
        while position <= end:
            found = heads.get(text[position : position + _HEAD])
            # The longest first, as they were put in.
            size = 0
            if found:
                size = next((n for n, forms in found.items() if text[position : position + n] in forms), 0)
            if size:
                pieces += (text[last:position], REMOVED)
                position = last = position + size
            else:
                position += 1
        return "".join((*pieces, text[last:]))

    def _all_forms(self) -> list[str]:
        """What has been removed, in the ways in which programs write it; the longest first: one may contain another."""
        forms: set[str] = set()
        for one in self._secret - self._shown:
            forms |= {one, json.dumps(one)[1:-1], repr(one)[1:-1], urllib.parse.quote(one, safe="")}
        return sorted(forms, key=lambda form: (-len(form), form))

    def document(self, value: Any) -> Any:
        """A document of JSON values with its texts masked; keys stay, so that it can be read by programs."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.document(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.document(one) for one in value]
        return value


_CREDENTIALS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"://[^\s/?#]{1,512}@"), f"://{REMOVED}@"),
    (
        re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.S),
        REMOVED,
    ),
    (re.compile(r"(?i)\b(bearer|basic)(\s{1,8})[A-Za-z0-9+/=._~-]{8,}"), rf"\1\2{REMOVED}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,256}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"), REMOVED),
    (
        re.compile(
            r"(?i)((?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|credential)[a-z0-9_.-]{0,32}"
            r"[\"']?\s{0,8}[:=]\s{0,8}[\"']?)([^\s\"',;&]{3,})"
        ),
        rf"\1{REMOVED}",
    ),
)  # fmt: skip
"""What looks like a credential wherever it stands: what to look for, and what to put in its place.
Every repetition is bounded or followed by nothing: the text may be a guest's, made to take long.
"""
