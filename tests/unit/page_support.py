"""For tests of kata-monitor's page: engines that are simulated, and a browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

MIB = 1 << 20
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
PHASES = (
    ("engine", 0.0, 0.04),
    ("hypervisor process", 0.04, 0.21),
    ("kernel", 0.25, 0.42),
    ("agent start", 0.67, 0.06),
)


class Simulated:
    """What one engine says: counters that grow with a clock of the test's own.

    Args:
        name: The container's name.
        number: Makes it differ from the others.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.clock = 0.0
        self.changes: dict[str, Any] = {}
        self.container: dict[str, Any] = {}
        self.console = "[    0.000000] Linux version 6.12 (small)\n"
        self.log = f"{name}: ready to serve\n"

    @property
    def id(self) -> str:
        return f"{self.number:04x}" * 8

    def document(self) -> dict[str, Any]:
        """The state document of an engine."""
        passed, n = self.clock, self.number
        load = 0.08 + 0.35 * (1 + math.sin(n + passed / 9)) * (n % 3) / 2
        cpu = passed * load
        memory = (24 + 11 * n) * MIB + int(MIB * 4 * math.sin(n + passed / 5))
        return {
            "time": 1_795_000_000.0 + passed,
            "id": self.id,
            "client": "kata",
            "namespace": "",
            "state": "ready",
            "error": "",
            "created": 1_795_000_000.0 - 60 * n**3 - 7,
            "name": self.name,
            "labels": {},
            "hypervisor": {
                "name": "qemu",
                "version": "",
                "pid": 100 + n,
                "accelerator": "kvm",
                "channel": "vsock",
            },
            "vcpus": 1,
            "memory_bytes": 256 * MIB,
            "host": {
                "cpu_seconds": cpu * 1.1,
                "memory_bytes": memory + 46 * MIB,
                "processes": [
                    {
                        "role": role,
                        "pid": 100 + n + offset,
                        "cpu_seconds": cpu * share,
                        "rss_bytes": size * MIB,
                        "threads": 1 + offset,
                        "read_bytes": 0,
                        "written_bytes": 4096,
                    }
                    for offset, (role, share, size) in enumerate(
                        (("engine", 0.02, 20), ("hypervisor", 1.07, 80), ("virtiofsd", 0.01, 4))
                    )
                ],
            },
            "guest": {
                "memory_total_bytes": 248 * MIB,
                "memory_available_bytes": 248 * MIB - memory,
                "memory_returned_bytes": 256 * MIB - memory - 20 * MIB,
                "cpu_seconds": cpu,
                "load1": 0.1,
            },
            "overhead": {"cpu_seconds": cpu * 0.1, "memory_bytes": 46 * MIB},
            "network": [
                {"interface": "lo", "received_bytes": passed * 1e9, "sent_bytes": passed * 1e9},
                {
                    "interface": "eth0",
                    "received_bytes": int(passed * 1800 * n),
                    "received_packets": 1,
                    "sent_bytes": int(passed * 950 * n),
                    "sent_packets": 1,
                },
            ],
            "disk_error": "",
            "disk_errors": 0,
            "containers": [
                {
                    "id": self.id,
                    "name": self.name,
                    "image": "docker.io/library/" + self.name.split("-")[0],
                    "state": "running",
                    "created": 1_795_000_000.0,
                    "started": 1_795_000_000.0,
                    "pid": 101 + n,
                    "exit_code": None,
                    "oom_kills": 0,
                    "cpu_seconds": cpu,
                    "throttled_seconds": 0.0,
                    "throttled_periods": 0,
                    "memory_bytes": memory,
                    "memory_limit_bytes": 256 * MIB,
                    "pids": 3 + n,
                    "read_bytes": 5 * MIB,
                    "written_bytes": int(passed * 3000 * (n % 4)),
                    "labels": {},
                }
                | self.container
            ],
            "timings": [
                {"name": name, "start_seconds": start, "duration_seconds": long * (1 + n % 3 / 10)}
                for name, start, long in PHASES
            ],
        } | self.changes

    async def peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers as the management socket of an engine."""
        head = await reader.readuntil(b"\r\n\r\n")
        target = urlsplit(head.split(b" ", 2)[1].decode())
        body = json.dumps(self.document())
        if target.path == "/kata/v1/console":
            body = self.console
        elif target.path == "/kata/v1/logs":
            body = self.log if parse_qs(target.query)["container"] == [self.id] else ""
        data = body.encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        await writer.drain()
        writer.close()


@contextlib.contextmanager
def browser(width: int = 1400, height: int = 1000, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A headless browser, with a profile that goes with it."""
    profile = tempfile.mkdtemp(prefix="kata-page-")
    options = Options()
    options.binary_location = CHROMIUM
    for one in (
        *(
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "hide-scrollbars",
            "no-first-run",
        ),
        *(
            f"user-data-dir={profile}",
            f"window-size={width},{height}",
            "force-device-scale-factor=1",
            "lang=en-GB",
        ),
        *(("blink-settings=preferredColorScheme=0",) if dark else ()),
    ):
        options.add_argument(f"--{one}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = None
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        if driver is not None:
            driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def until(driver: webdriver.Chrome, what: Callable[[], Any], why: str, patience_s: float = 40.0) -> Any:
    """What *what* returns, once that is true."""
    give_up = time.monotonic() + patience_s
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > give_up:
            raise AssertionError(f"{why}: {driver.find_element('tag name', 'body').text[:2000]}")
        time.sleep(0.1)


def screenshot(driver: webdriver.Chrome, path: Path) -> None:
    """Write what is seen as PNG."""
    path.write_bytes(driver.get_screenshot_as_png())
