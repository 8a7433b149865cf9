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
import selectors
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = "1.17.0-dev"
TIME = "2026-11-28T16:52:18.441166283"
Answer = tuple[int, object]


class Refusal(Exception):
    """An answer that is an error: status 400 and one sentence."""


class Monitor:
    """The program.

    Args:
        options: Values of its options, by name.
    """

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
        self.faults = dict(
            word.partition("=")[2].split(":", 1) for word in words if word.startswith("scripted.fault=")
        )
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
                    f"Boot source error: The {what} file cannot be opened: {said(error)}"
                ) from None
        if self.faults.get("boot"):
            raise Refusal("It was ordered")
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
                f"{sentence} backend error: Error manipulating the backing file: {said(error)} {path}"
            ) from None
        if drive["drive_id"] in self.fds:
            os.close(self.fds[drive["drive_id"]])
        self.fds[drive["drive_id"]] = fd

    # ---- what it is asked ----

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        name = f"{method.lower()}_{path.replace('/', '_')}".rstrip("_")
        if path.startswith("drives/"):
            name = f"{method.lower()}_drive"
        handler = getattr(self, name, None)
        if handler is None:
            raise Refusal(f"Invalid request method and/or path: {method} {path}.")
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
            raise Refusal(f"{refusal} Please verify the request arguments.") from None
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
            raise Refusal("The requested operation is not supported after starting the microVM.")
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


def misbehave(sock: socket.socket, kind: str) -> None:
    """Do what was ordered."""
    if kind == "nonsense":
        sock.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n")
    elif kind == "die":
        os.write(2, f"{TIME} [anonymous-instance:main] error: this is the end\n".encode())
        os._exit(148)
    elif kind == "refuse":
        raise Refusal("It was ordered to refuse")


class Connection:
    """One client of the API."""

    def __init__(self, monitor: Monitor, sock: socket.socket) -> None:
        self._monitor = monitor
        self._sock = sock
        self._data = b""

    def read(self) -> bool:
        """Answer what has come; False at the end."""
        data = self._sock.recv(65536)
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
            length = int(fields.get(b"Content-Length", b"0"))
            if len(rest) < length:
                break
            self._data = rest[length:]
            method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
            self._answer(method, path.removeprefix("/"), json.loads(rest[:length] or b"{}"))
        return bool(data)

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> None:
        monitor = self._monitor
        part = path.partition("/")[0] or "info"
        if monitor.ends and part != "info":
            os._exit(0)
        status: int
        content: object
        try:
            if part in monitor.faults:
                misbehave(self._sock, monitor.faults[part])
                return
            status, content = monitor.answer(method, path, body)
        except Refusal as refusal:
            status, content = 400, {"fault_message": str(refusal)}
        text = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
        head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{about}\r\n"
        self._sock.sendall(head.encode() + text)


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
    selector = selectors.DefaultSelector()
    selector.register(monitor.listener, selectors.EVENT_READ)
    selector.register(monitor.vsock, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is monitor.vsock:
                monitor.vsock.accept()[0].close()
            elif key.fileobj is monitor.listener:
                sock = monitor.listener.accept()[0]
                selector.register(sock, selectors.EVENT_READ, Connection(monitor, sock))
            elif not key.data.read():
                selector.unregister(key.fileobj)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
