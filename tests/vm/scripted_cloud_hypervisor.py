#!/usr/bin/python3 -IS
"""A program that answers as Cloud Hypervisor 54 was seen to answer, and runs no guest.

It takes the command line that the product gives it, listens where it is told to, opens what it is given, and says on
its API, its event monitor, its standard output and error what the real one says (status, body, order). Nobody listens
in its guest: a connection to its vsock is closed. So it stands for the real one where that, or KVM, is missing, in what
is said between the two and in what goes wrong there; a guest that does something is the real one's.

Words of the kernel's command line make it misbehave:

``scripted.fault=CALL:KIND``  where it is asked CALL (``vm.add-disk``): ``hang`` says nothing, ``nonsense`` no HTTP,
``half`` stops in the middle of an answer, ``huge`` announces one without end, ``refuse`` an error, ``die`` ends.
``scripted.end=HOW``          ``poweroff`` or ``reboot`` as soon as something is asked for after the start.
``scripted.keeps``            the guest lets go of no device.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

from scripted_api import Answer, Refusal, faults_of, serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = {"build_version": "v54.0.0", "version": "54.0.0", "features": ["io_uring", "kvm"]}
NEVER = (1 << 64) - 1
"""What the real one says of latencies before the first operation."""


def arguments(argv: list[str]) -> dict[str, list[str]]:
    """Options with their values: each has one, ``--disk``, ``--net`` and ``--landlock-rules`` may have several."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word[2:]
            found.setdefault(name, [])
        else:
            found[name].append(word)
    return found


def pairs(text: str) -> dict[str, str]:
    """``a=1,b=[2,3]`` as a dictionary."""
    found, depth, word = {}, 0, ""
    for letter in text + ",":
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            key, _, value = word.partition("=")
            found[key] = value
            word = ""
        else:
            word += letter
    return found


def size(text: str) -> int:
    """``256M`` in bytes."""
    return int(text[:-1]) << 20 if text.endswith("M") else int(text)


class Monitor:
    """The program.

    Args:
        options: See `arguments`.
    """

    SERVER = "Cloud Hypervisor API"
    PREFIX = "/api/v1/"
    LAST_WORDS = b"cloud-hypervisor: 1.0s: <vmm> ERROR: this is the end\n"
    DIES = 134

    def __init__(self, options: dict[str, list[str]]) -> None:
        self.events = socket.socket(fileno=descriptor(options["event-monitor"][0]))
        self.listener = socket.socket(fileno=descriptor(options["api-socket"][0]))
        self.state = ""
        self.balloon = 0
        self.fds: list[int] = []
        self.kept: list[int] = []
        if "restore" in options:
            self._load(pairs(options["restore"][0]))
        else:
            self.config = self._config(options)
        words = self.config["payload"]["cmdline"].split()
        self.faults = faults_of(words)
        self.ends = next((word[13:] for word in words if word.startswith("scripted.end=")), "")
        self.keeps = "scripted.keeps" in words

    def _config(self, options: dict[str, list[str]]) -> dict[str, Any]:
        memory = pairs(options["memory"][0])
        vsock = pairs(options["vsock"][0])
        config: dict[str, Any] = {
            "cpus": {"boot_vcpus": int(pairs(options["cpus"][0])["boot"])},
            "memory": {"size": size(memory["size"]), "hotplug_size": size(memory.get("hotplug_size", "0"))},
            "payload": {
                "kernel": options["kernel"][0],
                "cmdline": options["cmdline"][0],
                "initramfs": options["initramfs"][0],
            },
            "disks": [{**pairs(text), "image_type": "Raw"} for text in options.get("disk", [])],
            "net": [],
            "vsock": {"id": vsock["id"], "socket": vsock["socket"], "cid": int(vsock["cid"])},
        }
        for text in options.get("net", []):
            net = pairs(text)
            config["net"].append({**net, "fds": [int(net["fd"][1:-1])]})
        if "balloon" in options:
            config["balloon"] = {"size": 0, "free_page_reporting": True}
        return config

    def _load(self, restore: dict[str, str]) -> None:
        directory = restore["source_url"].removeprefix("file://")
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        for name in ("state.json", "memory-ranges"):
            with open(os.path.join(directory, name), "rb") as content:
                if not content.read(1):
                    raise Refusal(500, "Error restoring VM", "Cannot restore VM", f"cannot read {name}")
        nets = restore.get("net_fds", "[]")[1:-1]
        given = dict(word.strip(",").split("@[") for word in nets.split("]") if word)
        if list(given) != [net["id"] for net in self.config["net"]]:
            raise Refusal(500, "Number of Net FDs passed for all the devices is different")
        for net in self.config["net"]:
            net["fds"] = [int(given[net["id"]])]

    # ---- what it says ----

    def event(self, name: str, source: str = "vm", **properties: str) -> None:
        told = {
            "timestamp": {"secs": 0, "nanos": 1},
            "source": source,
            "event": name,
            "properties": properties or None,
        }
        self.events.sendall(json.dumps(told, indent=2).encode() + b"\n")

    def boot(self) -> None:
        """Open everything, and say so."""
        self.event("starting", "vmm")
        payload = self.config["payload"]
        for path in (payload["kernel"], payload["initramfs"]):
            try:
                os.close(os.open(path, os.O_RDONLY))
            except OSError as error:
                sentences = "The VM could not boot", "Cannot open initramfs file"
                raise Refusal(500, *sentences, f"{error.strerror} (os error {error.errno})") from None
        for disk in self.config["disks"]:
            self._open(disk)
        for net in self.config["net"]:
            os.fstat(net["fds"][0])
        self.vsock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.vsock.bind(self.config["vsock"]["socket"])
        self.vsock.listen(8)
        self.event("booting")
        self.state = "Running"
        self.event("booted")
        if not os.isatty(1):
            os.write(1, b"[    0.000000] Linux version: there is none, this is scripted\r\n")

    def _open(self, disk: dict[str, Any]) -> None:
        readonly = disk["readonly"] in (True, "on")
        try:
            self.fds.append(os.open(disk["path"], os.O_RDONLY if readonly else os.O_RDWR))
        except OSError as error:
            raise Refusal(
                500,
                *("Error from API", "The disk could not be added to the VM", "Error from device manager"),
                *("Cannot open disk path", f"I/O error (path={disk['path']} op=open)"),
                f"{error.strerror} (os error {error.errno})",
            ) from None

    def end(self, *events: str) -> None:
        for name in events:
            self.event(name)
        self.event("shutdown", "vmm")
        os._exit(0)

    # ---- what it is asked ----

    def part_of(self, path: str) -> str:
        return path

    def is_asked(self, part: str) -> None:
        if self.ends and part not in ("vmm.ping", "vm.info"):
            self.end(*(("rebooting",) if self.ends == "reboot" else ("shutdown", "deleted")))

    def refused(self, refusal: Refusal) -> Answer:
        return refusal.status, list(refusal.args)

    def answer(self, method: str, path: str, body: dict[str, Any], fds: list[int]) -> Answer:
        name = path
        handler = getattr(self, name.replace(".", "_").replace("-", "_"), None)
        if handler is None:
            raise Refusal(404, "Not Found")
        wants = "GET" if name in ("vmm.ping", "vm.info", "vm.counters") else "PUT"
        if method != wants:
            raise Refusal(400, "Bad Request")
        found: Answer = handler(body, fds)
        return found

    def vmm_ping(self, body: dict[str, Any], fds: list[int]) -> Answer:
        return 200, {**VERSION, "pid": os.getpid()}

    def vm_info(self, body: dict[str, Any], fds: list[int]) -> Answer:
        memory = self.config["memory"]
        actual = memory["size"] + memory.get("hotplugged_size", 0) - self.balloon
        return 200, {"config": self.config, "state": self.state, "memory_actual_size": actual}

    def vm_counters(self, body: dict[str, Any], fds: list[int]) -> Answer:
        disk = {"read_bytes": 0, "read_ops": 0, "write_bytes": 4096, "write_ops": 1}
        disk |= {"read_latency_min": NEVER, "read_latency_max": NEVER, "read_latency_avg": NEVER // 10000}
        disk |= {"write_latency_min": 5, "write_latency_max": 9, "write_latency_avg": 7}
        net = {"rx_bytes": 10, "rx_frames": 1, "tx_bytes": 20, "tx_frames": 2}
        found = {one["id"]: disk for one in self.config["disks"]}
        return 200, {**found, **{one["id"]: net for one in self.config["net"]}}

    def vm_add_disk(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self._unique(body, "The disk could not be added to the VM")
        self._open(body)
        self.config["disks"].append(body)
        return self._added(body)

    def vm_add_net(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self._unique(body, "The network device could not be added to the VM")
        if len(fds) != 1:
            raise Refusal(500, "Error from API", "The network device could not be added to the VM", "no tap")
        self.kept += fds
        self.config["net"].append({**body, "fds": fds})
        return self._added(body)

    def _unique(self, body: dict[str, Any], sentence: str) -> None:
        if any(body["id"] == one["id"] for one in (*self.config["disks"], *self.config["net"])):
            what = f"Identifier {body['id']} is not unique"
            raise Refusal(409, "Error from API", sentence, "Failed to validate config", what)

    def _added(self, body: dict[str, Any]) -> Answer:
        return 200, {"id": body["id"], "bdf": f"0000:00:{body['pci_device_id']:02x}.0"}

    def vm_remove_device(self, body: dict[str, Any], fds: list[int]) -> Answer:
        for kind in ("disks", "net"):
            for one in self.config[kind]:
                if one["id"] == body["id"]:
                    if not self.keeps:
                        self.config[kind].remove(one)
                        self.event("device-removed", id=body["id"], bdf="0000:00:00.0")
                    return 204, None
        raise Refusal(
            404,
            *("Error from API", "The device could not be removed from the VM", "Error from device manager"),
            f"Failed to find device corresponding to the given identifier: {body['id']}",
        )

    def vm_resize(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self.event("resizing")
        memory = self.config["memory"]
        if "desired_ram" in body:
            more = body["desired_ram"] - memory["size"]
            if more > memory["hotplug_size"]:
                sentences = "Error from API", "The VM could not be resized", "Memory manager error"
                raise Refusal(
                    500, *sentences, "Failed to virtio-mem resize\n\nStack backtrace:\n   0: <unknown>"
                )
            memory["hotplugged_size"] = more
        if "desired_balloon" in body:
            self.balloon = body["desired_balloon"]
        self.event("resized")
        return 204, None

    def vm_pause(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self.event("pausing")
        self._turn("Paused", "The VM could not be paused", "Cannot pause VM")
        self.event("paused")
        return 204, None

    def vm_resume(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self.event("resuming")
        self._turn("Running", "The VM could not resume", "Cannot resume VM")
        self.event("resumed")
        return 204, None

    def _turn(self, state: str, *sentences: str) -> None:
        if self.state == state:
            what = f"Invalid transition: InvalidStateTransition({state}, {state})"
            raise Refusal(500, "Error from API", *sentences, "Failed to change migratable component", what)
        self.state = state

    def vm_snapshot(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self.event("snapshotting")
        sentences = "Error from API", "The VM could not be snapshotted", "Cannot snapshot VM"
        if self.state != "Paused":
            what = "Failed to snapshot migratable component", "Trying to snapshot while VM is running"
            raise Refusal(500, *sentences, *what)
        directory = body["destination_url"].removeprefix("file://")
        for name, content in (("config.json", self.config), ("state.json", {}), ("memory-ranges", [0])):
            with open(os.path.join(directory, name), "x", encoding="utf-8") as file:
                json.dump(content, file)
        self.event("snapshotted")
        return 204, None

    def vmm_shutdown(self, body: dict[str, Any], fds: list[int]) -> Answer:
        self.end("shutdown", "deleted")
        return 200, None


def descriptor(text: str) -> int:
    """``fd=7``."""
    return int(pairs(text)["fd"])


def main(argv: list[str]) -> int:
    if argv == ["--version"]:
        print("cloud-hypervisor v54.0.0")
        return 0
    try:
        monitor = Monitor(arguments(argv))
        monitor.boot()
    except (Refusal, OSError) as error:
        chain = "".join(f"\n  {number}: {sentence}" for number, sentence in enumerate(error.args))
        print(f"Error: Cloud Hypervisor exited with the following chain of errors:{chain}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: monitor.end("shutdown", "deleted"))
    return serve(monitor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
