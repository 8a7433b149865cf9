"""Makes the pictures of the monitor's page for the documentation: ``python tests/unit/page_pictures.py DIRECTORY``.

`make screenshots` calls it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "src"), str(ROOT / "tests")]

from browser_support import Browser, browser  # noqa: E402
from page_support import BEGIN, Clock, busy_node, serving  # noqa: E402

LARGEST = 150_000
"""Bytes of a picture."""
PICTURES = {
    "monitor-desktop": ("", 1360, 900, "light"),
    "monitor-dark": ("", 1360, 900, "dark"),
    "monitor-sandbox": ("?open=1f3a91c0d27e", 1360, 900, "light"),
    "monitor-start": ("?open=1f3a91c0d27e&tab=start", 1360, 640, "dark"),
    "monitor-phone": ("", 360, 740, "dark"),
}
"""By file name: what follows the page's address, width and height, and colour scheme."""


def take(page: Browser, into: Path) -> None:
    """Take all pictures.

    Args:
        page: The browser.
        into: The directory.
    """
    for name, (address, width, height, scheme) in PICTURES.items():
        # All samples are said at once, so that the pictures do not depend on how fast it goes.
        node = busy_node(Clock(BEGIN))
        node.hurry = 140
        with serving(node):
            page.looks(width, height, scheme)
            page.open(f"{node.url}{address}")
            page.waits_for("#connection-text", "Live")
            time.sleep(2)
            page.run("document.activeElement.blur()")
            page.picture(into / f"{name}.webp")
        size = (into / f"{name}.webp").stat().st_size
        if size >= LARGEST:
            raise SystemExit(f"error: {name}.webp has {size} bytes; {LARGEST} are allowed")


if __name__ == "__main__":
    with browser() as one:
        take(one, Path(sys.argv[1]))
