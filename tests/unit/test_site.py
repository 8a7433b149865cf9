"""`make site`: the site has all documents, and no link on it leads nowhere."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import docs_site
import pytest
from browser_support import browser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not docs_site.PACKAGES.is_dir():
        pytest.skip("needs build/site-env (tools/setup site)")
    directory = tmp_path_factory.mktemp("site")
    assert docs_site.build(directory) == ""
    return directory


def test_every_document_is_on_it(site: Path) -> None:
    documents = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    expected = {"index.html", "CONTRIBUTING.html", "SECURITY.html", "CHANGELOG.html", "findings/index.html"}
    for path in documents:
        expected.add(
            str(path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html"))
        )
    assert {str(path.relative_to(site)) for path in site.rglob("*.html")} == {*expected, "404.html"}


def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert docs_site.broken_links(site) == []


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="one"></h1><a href="#one"></a><a href="b.html#two"></a><a href="b.html#three"></a>'
        '<a href="c.html"></a><a href="https://example.com/"></a><img src="https://example.com/i.png">'
    )
    (tmp_path / "b.html").write_text('<a name="two" href="a.html"></a>')
    assert docs_site.broken_links(tmp_path) == [
        "a.html: b.html#three",
        "a.html: c.html",
        "a.html: https://example.com/i.png is fetched from elsewhere",
    ]


def test_a_link_to_a_file_that_the_site_has_not_becomes_its_text(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert re.search(r'<a href="onboarding\.html">docs/onboarding\.md</a>', text)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site, served on loopback."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with mock.patch.object(SimpleHTTPRequestHandler, "log_message"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def test_a_reader_finds_a_page_by_a_word(address: str) -> None:
    with browser() as one:
        one.open(f"{address}/index.html")
        assert one.text("h1").startswith("kata")
        assert {"Tutorials", "A laptop"} <= {text.strip() for text in one.texts(".md-nav__link")}
        one.click(".md-search__input")
        one.press(*"symptom")
        one.waits_for(".md-search-result__list", "Troubleshooting, by symptom")
        one.open(f"{address}/troubleshooting.html")
        for width, scheme in ((1360, "light"), (390, "dark")):
            one.looks(width, 900, scheme)
            assert one.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert one.said() == []
