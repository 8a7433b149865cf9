"""A real browser without a window: Debian's chromium, driven by its own chromedriver. It leaves nothing behind."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from waiting import until

ROOT = Path(__file__).resolve().parents[1]

WATCH = """
window.seen = {violations: [], shifts: 0, long: []};
document.addEventListener("securitypolicyviolation", (event) => {
  window.seen.violations.push(event.violatedDirective + " " + event.blockedURI + " " + event.sourceFile);
});
for (const name of ["alert", "confirm", "prompt", "print"]) {
  window[name] = () => { window.seen.violations.push(name); };
}
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) window.seen.shifts += one.value;
}).observe({type: "layout-shift", buffered: true});
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) window.seen.long.push(one.duration);
}).observe({type: "longtask", buffered: true});
"""
"""Runs before anything of the page: takes down what its policy refused, and what it does to its reader."""


class Browser:
    """The browser.

    Args:
        directory: Where its profile, and all else that it writes, is.
    """

    def __init__(self, directory: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in (
            "--headless=new",
            "--no-sandbox",  # which root cannot have
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--no-first-run",
            "--hide-scrollbars",
            "--font-render-hinting=none",
            "--force-color-profile=srgb",
            "--lang=en",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={directory / 'profile'}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        environment = {**os.environ, "HOME": str(directory), "TMPDIR": str(directory), "TZ": "UTC"}
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
            environment[name] = str(directory)
        environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
        self.driver = webdriver.Chrome(
            options=options,
            service=Service(shutil.which("chromedriver") or "", env=environment, log_output=os.devnull),
        )
        self.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.looks()

    def command(self, name: str, **arguments: Any) -> Any:
        """One of the browser's own commands (Chrome DevTools Protocol)."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def looks(self, width: int = 1360, height: int = 900, scheme: str = "light") -> None:
        """The size of what is seen, and the colours that the system asks for."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.command(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def open(self, url: str) -> None:
        self.driver.get("about:blank")
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return until(lambda: next(iter(self.all(selector)), None), f"no {selector}") or pytest.fail(selector)

    def text(self, selector: str) -> str:
        """The text of an element, as it is in the page: also of what is scrolled out of sight."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(
            self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)
        )

    def click(self, selector: str) -> None:
        element = self.one(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys: str) -> None:
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()

    def waits_for(self, selector: str, text: str) -> None:
        """Until an element has this text."""
        until(
            lambda: text in self.text(selector),
            f"{selector} without {text!r}",
            lambda: self.text(selector)[:2000],
        )

    def focused(self) -> str:
        return str(self.run("return document.activeElement.textContent"))

    def picture(self, path: Path) -> None:
        """What is seen, as WebP: half of PNG's size."""
        made = self.command("Page.captureScreenshot", format="webp", quality=82)
        path.write_bytes(base64.b64decode(made["data"]))

    def said(self) -> list[str]:
        """What the page did that it must not: refused by its policy, dialogs, errors in its code."""
        with contextlib.suppress(NoAlertPresentException):
            self.driver.switch_to.alert.dismiss()
            return ["a dialog"]
        found = [str(one) for one in self.run("return window.seen.violations")]
        found += [
            one["message"]
            for one in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if one["level"] == "SEVERE" and "ERR_CONNECTION_REFUSED" not in one["message"]
        ]
        return found

    def close(self) -> None:
        self.driver.quit()


def processes(directory: Path) -> list[int]:
    """Processes that have to do with the directory."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and str(directory).encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
    return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser while the block runs; afterwards neither a process nor a file of it is there."""
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (apt-get install {package})")
    directory = Path(tempfile.mkdtemp(prefix="kata-page-", dir="/tmp"))
    try:
        one = Browser(directory)
        try:
            yield one
        finally:
            one.close()
        until(
            lambda: not processes(directory), "the browser has not ended", lambda: str(processes(directory))
        )
    finally:
        shutil.rmtree(directory)


def axe() -> str:
    """The script of the accessibility checker; the test is skipped without."""
    found = sorted((ROOT / "build").glob("axe-*/axe.min.js"))
    if not found:
        pytest.skip("needs axe (tools/setup test unpacks it)")
    return found[-1].read_text()


__all__ = ["Browser", "Keys", "axe", "browser", "processes"]
