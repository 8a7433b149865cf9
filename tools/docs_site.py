"""Makes the site of the documents, and looks whether every link on it leads somewhere.

The pages are those of docs/ and a few of the checkout's top (tools/site_hooks.py); mkdocs.yml has the order. mkdocs
runs with what is in build/site-env (`tools/setup site`), strictly: a page that the navigation lacks, or a link in a
document to a file or heading that is not there, is a failure. What it wrote is then read as a browser would.

Usage: docs_site.py DIRECTORY
"""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "build/site-env"


class Page(HTMLParser):
    """One page of the site.

    Args:
        text: Its HTML.

    Attributes:
        links: The addresses that it names, of other pages and of what it loads.
        loaded: Those of them that a browser fetches by itself.
        anchors: What a link may name after its ``#``.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what an element names."""
        given = {name: value for name, value in attrs if value}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        target = given.get("href") or given.get("src")
        if target:
            self.links.append(target)
            if "src" in given or (tag == "link" and "stylesheet" in given.get("rel", "")):
                self.loaded.append(target)


def build(directory: Path) -> str:
    """Make the site.

    Args:
        directory: Where to; what is there is replaced.

    Returns:
        What mkdocs has against the documents; empty when all is well.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(directory)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(PACKAGES),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_MKDOCS_2_WARNING": "1",  # of the theme: it advertises its successor
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"status {done.returncode}"


def pages(directory: Path) -> dict[Path, Page]:
    """The pages of a site that was made, by their files."""
    return {path: Page(path.read_text()) for path in sorted(directory.rglob("*.html"))}


def broken_links(directory: Path) -> list[str]:
    """Links within the site that lead nowhere, and what its pages would fetch from elsewhere: ``PAGE: ADDRESS``."""
    found = pages(directory.resolve())
    wrong = []
    for path, page in found.items():
        name = path.relative_to(directory.resolve())
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded:
                    wrong.append(f"{name}: {address} is fetched from elsewhere")
                continue
            if path.name == "404.html":
                continue  # it is served for any address, so its links begin at the server's root
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target in found or target.is_file()
            anchors = found[target].anchors if target in found else set()
            if not there or (target in found and unquote(parts.fragment) not in {"", *anchors}):
                wrong.append(f"{name}: {address}")
    return wrong


def main() -> int:
    """Make the site and say what is wrong with it; 1 when something is."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    if not PACKAGES.is_dir():
        print("error: there is no build/site-env\nhint: tools/setup site", file=sys.stderr)
        return 1
    wrong = build(directory) or "\n".join(broken_links(directory))
    if wrong:
        print(f"{wrong}\nerror: the site of the documents is not right", file=sys.stderr)
        return 1
    print(directory / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
