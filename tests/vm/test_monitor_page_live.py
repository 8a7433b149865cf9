"""kata-monitor's page and a real sandbox: the browser sees it come, live and go."""

from __future__ import annotations

import json
import os

import pytest
from browser_support import browser
from conftest import Kata
from monitor_support import monitor
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HOSTILE = "<img src=x onerror=alert(1)>"
SCRIPT = (
    f"echo '{HOSTILE}'; printf 'bell\\007 and \\342\\200\\256turned\\n'; "
    "while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.2; done"
)


def test_a_sandbox_as_a_browser_sees_it(kata_env: Kata, busybox_image: str) -> None:
    with (
        monitor(kata_env.run_dir.parent, run_dir=kata_env.run_dir) as one,
        browser() as page,
    ):
        page.open(f"http://127.0.0.1:{one.port}/")
        page.waits_for("#connection-text", "Live")
        page.waits_for(".none", "No sandbox runs on this node")
        kata_env.ok("run", "-d", "--name", "web", busybox_image, "sh", "-c", SCRIPT)
        sandbox = json.loads(kata_env.ok("inspect", "web"))[0]["id"]
        page.waits_for(".row.main .name", "web")
        page.waits_for(".row.main .c-state", "ready")
        page.waits_for(".row.container .c-state", "running")

        def figure(selector: str) -> float:
            text = page.text(f".row.main {selector}").split(" ")[0]
            return float(text) if text[0].isdigit() else 0.0

        # It computes without end; its guest has memory in use, and the host pays for more than that.
        until(lambda: figure(".c-cpu .number") > 0.02, "no processor time", lambda: page.text(".sandboxes"))
        until(lambda: figure(".c-memory .number") > 5, "no memory", lambda: page.text(".sandboxes"))
        assert figure(".c-overhead .number") > 1

        page.click(".row.main .name")
        page.waits_for("h1", "web")
        for text in ("qemu", "engine", busybox_image.rpartition("/")[2]):
            page.waits_for("#panel", text)
        page.click("#tab-start")
        steps = until(lambda: page.texts(".waterfall tbody th"), "no steps of its start")
        assert len(steps) >= 4
        page.click("#tab-console")
        page.waits_for(".text", "kata-agent")
        page.click("#tab-logs")
        page.waits_for(".text", HOSTILE)
        page.waits_for(".text", "bell\\x07 and \\u{202e}turned")
        page.click("#tab-events")
        page.waits_for("#panel tbody", "container.started")

        kata_env.ok("rm", "-f", "web")
        page.waits_for("#panel tbody", "sandbox.ended")
        until(lambda: page.one(".gone").is_displayed(), "it is not said to be gone")
        page.click("#to-events")
        page.waits_for("tbody", sandbox)
        page.click("#to-sandboxes")
        page.waits_for(".none", "No sandbox runs on this node")
        assert page.said() == []
