"""What a scrape knows of each sandbox."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.monitor.discovery import Sandbox
    from kata.monitor.merge import Contribution


class Outcome:
    """What came of asking one sandbox.

    Attributes:
        sandbox: Which.
        labels: Those that tell it, for its series.
        contribution: What it said; absent if nothing usable.
        problem: Why nothing, as a sentence.
        seconds: How long that took.
    """

    __slots__ = ("contribution", "labels", "problem", "sandbox", "seconds")

    def __init__(self, sandbox: Sandbox, labels: list[tuple[str, str]]) -> None:
        self.sandbox = sandbox
        self.labels = labels
        self.contribution: Contribution | None = None
        self.problem = ""
        self.seconds = 0.0
