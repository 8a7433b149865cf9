"""What the documents of the site need beside docs/: pages and files of the checkout's top, and links that fit.

The README is the site's first page. A link to a file of the source, which the site does not have, becomes its text.

Source: https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "findings/README.md": "findings/README.md",
}
"""Pages that are not in docs/ -> where they are on the site."""
_PIECE = re.compile(
    r"^(?P<fence>```+).*?^(?P=fence)`*\s*$"
    r"|(?P<mark>!?)\[(?P<text>(?:`[^`]*`|[^\]`])*)\]\((?P<target>[^)\s]+)\)"
    r"|`[^`\n]*`",
    re.DOTALL | re.MULTILINE,
)
"""A block of code, a link (whose text may have code in it), or code: whichever begins first."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put documents that the navigation does not have yet at its end; decisions are listed on a page of their own."""
    text = json.dumps(config.nav)
    documents = [path.relative_to(ROOT / "docs") for path in sorted((ROOT / "docs").rglob("*.md"))]
    more = [str(path) for path in documents if path.parts[0] != "adr" and f'"{path}"' not in text]
    if more:
        config.nav = [*(config.nav or []), {"More": more}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the files of deploy/."""
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for file in sorted((ROOT / "deploy").rglob("*")):
        if file.is_file():
            files.append(File.generated(config, str(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have the links of a page lead to where their targets are on the site."""
    place = page.file.src_uri
    original = next((path for path, on_site in PAGES.items() if on_site == place), f"docs/{place}")

    def changed(match: re.Match[str]) -> str:
        mark, text, target = match["mark"], match["text"], match["target"]
        if target is None:
            return match[0]  # code
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(original), path))
        on_site = PAGES.get(there, there.removeprefix("docs/"))
        if files.get_file_from_path(on_site) is None:
            return match[0] if mark else text
        link = posixpath.relpath(on_site, posixpath.dirname(place) or ".")
        return f"{mark}[{text}]({link}{'#' if anchor else ''}{anchor})"

    return _PIECE.sub(changed, markdown)
