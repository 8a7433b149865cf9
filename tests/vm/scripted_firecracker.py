#!/usr/bin/python3 -IS
"""A program that answers as Firecracker 1.17 was seen to answer, and runs no guest.

It takes the command line and the document that the product gives it, listens where it is told to, opens what it is
given, and says on its API, its metrics, its standard output and error what the real one says (status, body, order).
Nobody listens in its guest: a connection to its vsock is closed. So it stands for the real one where that, or KVM, is
missing, in what is said between the two and in what goes wrong there; a guest that does something is the real one's.

Words of the kernel's command line make it misbehave:

``scripted.fault=PART:KIND``  where it is asked for PART (``drives``, ``vm``; ``info`` is the path ``/``): ``hang``
says nothing, ``nonsense`` no HTTP, ``refuse`` an error, ``die`` ends;
``boot:refuse`` is a machine that it cannot build.
``scripted.end``              it ends in order, as when the guest restarts, once something is asked for after the start.
``scripted.keeps``            the guest takes half of the memory that it is given, and gives nothing back.
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

VERSION = "1.17.0-dev"
TIME = "2026-11-28T16:52:18.441166283"


class Monitor:
    """The program.

    Args:
        options: Values of its options, by name.
    """

    SERVER = "Firecracker API"
    PREFIX = "/"
    LAST_WORDS = f"{TIME} [anonymous-instance:main] error: this is the end\n".encode()
    DIES = 148

    def __init__(self, options: dict[str, str]) -> None:
        self.metrics = os.open(options["metrics-path"], os.O_WRONLY | os.O_NONBLOCK)
        with open(options["config-file"], encoding="utf-8") as file:
            self.config: dict[str, Any] = json.load(file)
        self.id = "anonymous-instance"
        self.state = "Not started"
        self.plugged = 0
        self.asked = {"drive_count": 0, "drive_fails": 0}
        self.fds: dict[str, int] = {}
        words = self.config["boot-source"]["boot_args"].split()
        self.faults = faults_of(words)
        self.ends = "scripted.end" in words
        self.keeps = "scripted.keeps" in words
        self.listener = listening(options["api-sock"])

    def boot(self) -> None:
        """Open everything."""
        for what, name in (("kernel", "kernel_image_path"), ("initrd", "initrd_path")):
            try:
                os.close(os.open(self.config["boot-source"][name], os.O_RDONLY))
            except OSError as error:
                raise Refusal(
                    400, f"Boot source error: The {what} file cannot be opened: {said(error)}"
                ) from None
        if self.faults.get("boot"):
            raise Refusal(400, "It was ordered")
        for drive in self.config["drives"]:
            self._open(drive, "Block device error: Unable to create the virtio block device: Virtio")
        self.vsock = listening(self.config["vsock"]["uds_path"])
        self.state = "Running"
        os.write(1, b"[    0.000000] Linux version: there is none, this is scripted\r\n")

    def _open(self, drive: dict[str, Any], sentence: str) -> None:
        path = drive["path_on_host"]
        try:
            fd = os.open(path, os.O_RDONLY if drive["is_read_only"] else os.O_RDWR)
        except OSError as error:
            raise Refusal(
                400, f"{sentence} backend error: Error manipulating the backing file: {said(error)} {path}"
            ) from None
        if drive["drive_id"] in self.fds:
            os.close(self.fds[drive["drive_id"]])
        self.fds[drive["drive_id"]] = fd

    # ---- what it is asked ----

    def part_of(self, path: str) -> str:
        return path.partition("/")[0] or "info"

    def is_asked(self, part: str) -> None:
        if self.ends and part != "info":
            os._exit(0)

    def refused(self, refusal: Refusal) -> Answer:
        return refusal.status, {"fault_message": refusal.args[-1]}

    def answer(self, method: str, path: str, body: dict[str, Any], fds: list[int]) -> Answer:
        name = f"{method.lower()}_{path.replace('/', '_')}".rstrip("_")
        if path.startswith("drives/"):
            name = f"{method.lower()}_drive"
        handler = getattr(self, name, None)
        if handler is None:
            raise Refusal(400, f"Invalid request method and/or path: {method} {path}.")
        found: Answer = handler(body)
        return found

    def get(self, body: dict[str, Any]) -> Answer:
        about = {"id": self.id, "state": self.state, "vmm_version": VERSION, "app_name": "Firecracker"}
        return 200, about

    def patch_vm(self, body: dict[str, Any]) -> Answer:
        # Twice the same is no error.
        self.state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]
        return 204, None

    def patch_drive(self, body: dict[str, Any]) -> Answer:
        self.asked["drive_count"] += 1
        known = [drive for drive in self.config["drives"] if drive["drive_id"] == body["drive_id"]]
        sentence = "Drive config error: Unable to patch the block device: Block: Virtio"
        try:
            self._open({**known[0], **body}, sentence)
        except Refusal as refusal:
            self.asked["drive_fails"] += 1
            raise Refusal(400, f"{refusal} Please verify the request arguments.") from None
        known[0].update(body)
        return 204, None

    def get_hotplug_memory(self, body: dict[str, Any]) -> Answer:
        return 200, {**self.config["memory-hotplug"], "plugged_size_mib": self.plugged}

    def patch_hotplug_memory(self, body: dict[str, Any]) -> Answer:
        wanted = body["requested_size_mib"]
        if not self.keeps:
            self.plugged = wanted
        elif wanted > self.plugged:
            self.plugged += (wanted - self.plugged) // 2
        return 204, None

    def patch_balloon(self, body: dict[str, Any]) -> Answer:
        self.config["balloon"]["amount_mib"] = body["amount_mib"]
        return 204, None

    def get_balloon_statistics(self, body: dict[str, Any]) -> Answer:
        size = self.config["balloon"]["amount_mib"]
        return 200, {
            "target_pages": size * 256,
            "actual_pages": size * 256,
            "target_mib": size,
            "actual_mib": size,
        }

    def put_actions(self, body: dict[str, Any]) -> Answer:
        if body["action_type"] == "InstanceStart":
            raise Refusal(400, "The requested operation is not supported after starting the microVM.")
        # What was counted since the last time; times of the last request.
        line = {
            "utc_timestamp_ms": 1795884591921,
            "block_disk0": {"read_bytes": 4096, "read_agg": {"min_us": 299, "max_us": 299, "sum_us": 299}},
            "block": {"read_bytes": 4096, "read_agg": {"min_us": 0, "max_us": 0, "sum_us": 299}},
            "latencies_us": {"pause_vm": 958},
            "patch_api_requests": self.asked,
            "vcpu": {"exit_io_in": 3},
        }
        os.write(self.metrics, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self.asked = dict.fromkeys(self.asked, 0)
        return 204, None


def listening(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(8)
    return sock


def said(error: OSError) -> str:
    return f"{error.strerror} (os error {error.errno})"


def main(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"Firecracker v{VERSION}\n\n")
        return 0
    argv = [word for word in argv if word != "--enable-pci"]
    options = {name.removeprefix("--"): value for name, value in zip(argv[::2], argv[1::2], strict=True)}
    try:
        monitor = Monitor(options)
        monitor.boot()
    except (Refusal, OSError) as error:
        with open(options["log-path"], "w", encoding="utf-8") as log:
            failed = "Failed to build MicroVM from Json: Configuration for VMM from one single json failed"
            log.write(f"{TIME} [anonymous-instance:main] RunWithApiError error: {failed}: {error}\n")
        print(f"Error: RunWithApi(BuildFromJson(ParseFromJson({type(error).__name__})))", file=sys.stderr)
        return 1
    signal.signal(signal.SIGHUP, lambda *_: os._exit(156))
    return serve(monitor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
