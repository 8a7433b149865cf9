"""`kata` with one of the hypervisors, for tests where there is KVM."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import netlab
from conftest import Kata
from hypervisor_lab import require
from netlab import HOST4, INTERNET4, INTERNET6
from waiting import until

from kata.hypervisor import registry

ALONE = ("--network", "none")
FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.5; done"


def with_hypervisor(kata: Kata, name: str, directory: Path, table: str = "") -> Kata:
    """Have kata use a hypervisor, or skip the test where that is not installed.

    Args:
        kata: As it is otherwise.
        name: The hypervisor.
        directory: For its configuration.
        table: Lines of the hypervisor's table.
    """
    require(registry.find(name))
    file = directory / "configuration.toml"
    file.write_text(f"[runtime]\nhypervisor_name = '{name}'\n[hypervisor.{name}]\n{table}\n")
    one = copy.copy(kata)
    one.env = {**kata.env, "KATA_CONF_FILE": str(file)}
    return one


def assert_user_network(kata: Kata, image: str, *options: str) -> None:
    """A container reaches what its host does, by both versions of IP and by name, and is reached at published ports."""
    big = 300_000
    # Servers are to hang up first: passt of 2023 may lose their FIN when the guest has sent one already.
    script = (
        'get() { (echo hello; sleep "$3") | timeout 60 nc -w 20 "$1" "$2"; }; cat /etc/resolv.conf;'
        f" get {INTERNET4} 8000 2; get {INTERNET6} 8000 2; get {INTERNET4} 8001 5 | wc -c;"
        " nslookup somewhere.example.com; echo told;"
        " nc -l -p 25 -e echo from the guest"
    )

    def there() -> list[str]:
        name = f"on{kata.directory.name}"
        kata.ok("run", "-d", "--name", name, "-p", "2525:25", *options, image, "sh", "-c", script)
        try:
            until(lambda: "told" in kata.ok("logs", name), "what it reaches")
            said = until(lambda: netlab.connect_in(internet, (HOST4, 2525)).decode(), "the published port")
            return [kata.ok("logs", name), said]
        finally:
            kata.ok("rm", "-f", name)

    with netlab.lab() as (host, internet):
        servers = [
            netlab.serve_in(internet, (INTERNET4, 8000), b"over IPv4\n"),
            netlab.serve_in(internet, (INTERNET6, 8000), b"over IPv6\n"),
            netlab.serve_in(internet, (INTERNET4, 8001), b"x" * big),
            netlab.serve_in(internet, (INTERNET4, 53), netlab.answer_a, socket.SOCK_DGRAM),
        ]
        told, said = netlab.within(host, there, f"nameserver {INTERNET4}\n")
        assert all(server.peers for server in servers), told
    lines = told.splitlines()
    assert {f"nameserver {INTERNET4}", "over IPv4", "over IPv6", str(big)} <= set(lines), told
    assert "192.0.2.77" in told
    assert said == "from the guest\n"
