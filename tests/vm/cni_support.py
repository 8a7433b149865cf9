"""CNI's bridge, as the tests of pods want it, and ports that crictl forwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from waiting import PATIENCE

PLUGINS = Path("/usr/lib/cni")


def write_network(directory: Path, name: str, subnet: str, *more: object, **bridge: object) -> Path:
    """Write the configuration of a network with one bridge.

    Args:
        directory: What is made is below it.
        name: The network's; its bridge is called ``{name}0``.
        subnet: In CIDR notation.
        more: Further plugins.
        bridge: Further settings of the bridge.

    Returns:
        The directory of the configuration.
    """
    networks = directory / "net.d"
    networks.mkdir()
    plugin = {
        "type": "bridge",
        "bridge": f"{name}0",
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(directory / "ipam"),
        },
        **bridge,
    }
    content = {"cniVersion": "0.4.0", "name": name, "plugins": [plugin, *more]}
    (networks / f"10-{name}.conflist").write_text(json.dumps(content))
    return networks


def forwarded(
    endpoint: str,
    around: Sequence[str],
    pod: str,
    port: int,
    data: bytes = b"",
    *,
    more: Callable[[], str] = str,
) -> bytes:
    """What a guest's server says to `data` through ``crictl port-forward``.

    Args:
        endpoint: The CRI's, as a URI.
        around: What runs a program in the daemon's network namespace, where crictl listens.
        pod: Its id.
        port: The server's.
        data: What is sent; the connection stays open until the server ends it.
        more: What else to say of a failure.
    """
    local = 20000 + os.getpid() % 10000
    command = ["crictl", "-r", endpoint, "-i", endpoint, "port-forward", pod, f"{local}:{port}"]
    process = subprocess.Popen(
        [*around, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        assert any(b"Forwarding from" in line for line in process.stdout), "it forwards nothing"
        client = (
            "import socket, sys, threading\n"
            f"s = socket.create_connection(('127.0.0.1', {local}), 60)\n"
            "threading.Thread(target=s.sendall, args=(sys.stdin.buffer.read(),), daemon=True).start()\n"
            "data = b''\n"
            "while piece := s.recv(65536): data += piece\n"
            "sys.stdout.buffer.write(data)"
        )
        done = subprocess.run(
            [*around, sys.executable, "-c", client],
            input=data,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode() + more()
        return done.stdout
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
