"""One scrape: every sandbox asked at the same time, each with a deadline, and what they said put together."""

from __future__ import annotations

import asyncio
import logging
import time

from kata.metrics import exposition
from kata.metrics.families import DEFINITIONS
from kata.monitor import merge
from kata.monitor.engines import Unreachable
from kata.monitor.outcome import Outcome
from kata.monitor.parsing import SmallFirst

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.monitor.discovery import Sandbox
    from kata.monitor.engines import Engines
    from kata.monitor.figures import Figures

_LOG = logging.getLogger("kata.monitor")
MAX_TOTAL_CHARACTERS = 96 << 20
"""Maximum size of all samples of a scrape. What comes after that is left out and counted."""
RESERVE_S = 0.25
"""What is kept of the time that Prometheus gives, for putting the answers together: at least, and of each second."""
_RESERVE_SHARE = 0.25


class Scraper:
    """Scrapes the sandboxes of a node.

    Args:
        engines: The way to them.
        figures: Where scrapes are counted.
        series: Maximum number of series of one sandbox.
    """

    def __init__(self, engines: Engines, figures: Figures, series: int) -> None:
        self._engines = engines
        self._figures = figures
        self._series = series
        self._types = {name: one.kind for name, one in DEFINITIONS.items()}
        self._parser = SmallFirst()

    def close(self) -> None:
        """End the parsing thread."""
        self._parser.close()

    async def node(
        self,
        sandboxes: Sequence[Sandbox],
        labels: Callable[[Sandbox], list[tuple[str, str]]],
        seconds: float,
        wanted: Sequence[str] = (),
    ) -> merge.Merged:
        """Scrape all sandboxes, and the monitor itself.

        Args:
            sandboxes: The sandboxes.
            labels: Of one of them.
            seconds: How long the scraper waits, in all.
            wanted: As of `merge.contribution`.
        """
        started = time.monotonic()
        until = started + seconds - max(RESERVE_S, seconds * _RESERVE_SHARE)
        self._figures.scrapes += 1
        # Those that failed the last time come last, so that others do not wait for a turn behind them.
        order = sorted(sandboxes, key=lambda one: one.failed)
        outcomes = [Outcome(one, labels(one)) for one in order]
        tasks = {asyncio.create_task(self._ask(one, until, wanted)) for one in outcomes}
        late = tasks
        try:
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        finally:
            for task in late:  # all of them, if nobody waits for this scrape any more
                task.cancel()
        if late:
            await asyncio.wait(late)
        outcomes.sort(key=lambda one: one.sandbox.id)
        room = MAX_TOTAL_CHARACTERS
        given = []
        for outcome in outcomes:
            if outcome.contribution is None:
                outcome.problem = outcome.problem or "its turn did not come in time"
                outcome.seconds = outcome.seconds or time.monotonic() - started
                self._figures.failed += 1
            else:
                _fit(outcome.contribution, room)
                room -= outcome.contribution.size
                given.append(outcome.contribution)
            _note(outcome)
        whole = merge.Merged(given, self._types)  # before the next lines: it counts what it leaves out
        self._figures.scraped(time.monotonic() - started)
        # Memory of machines that wait takes the kernel a moment each.
        families = await asyncio.to_thread(self._figures.families, outcomes)
        own = merge.contribution(families, (), 1 << 20, wanted, own=True)
        whole.add(own)
        return whole

    async def single(self, sandbox: Sandbox, wanted: Sequence[str] = ()) -> merge.Merged:
        """Scrape one sandbox, without labels that tell which: whoever asks knows it.

        Raises:
            Unreachable: It gave no metrics.
        """
        outcome = Outcome(sandbox, [])
        await self._ask(outcome, time.monotonic() + self._engines.timeout_s, wanted)
        if outcome.contribution is None:
            raise Unreachable(outcome.problem)
        return merge.Merged([outcome.contribution], self._types)

    async def _ask(self, outcome: Outcome, until: float, wanted: Sequence[str]) -> None:
        started = time.monotonic()
        try:
            async with self._engines.get(outcome.sandbox, "/metrics", until - started) as answer:
                outcome.seconds = time.monotonic() - started
                if answer.status != 200:
                    raise Unreachable(f"its engine answered with status {answer.status}")
                outcome.contribution = await self._parser.run(
                    len(answer.body), self._digest, answer.body, outcome.labels, wanted
                )
        except Unreachable as error:
            outcome.seconds = outcome.seconds or time.monotonic() - started
            outcome.problem = str(error)

    def _digest(
        self, body: bytes, labels: list[tuple[str, str]], wanted: Sequence[str]
    ) -> merge.Contribution:
        try:
            families = exposition.parse(body)
        except exposition.MalformedError as error:
            raise Unreachable(f"its metrics are malformed: {error}") from None
        return merge.contribution(families, labels, self._series, wanted)


def _note(outcome: Outcome) -> None:
    """Keep in mind whether a sandbox answered, and say so when it begins or ends not to."""
    sandbox, failed = outcome.sandbox, outcome.contribution is None
    if failed and not sandbox.failed:
        _LOG.warning("sandbox %s gives no metrics: %s", sandbox.id, outcome.problem)
    elif sandbox.failed and not failed:
        _LOG.info("sandbox %s gives metrics again", sandbox.id)
    sandbox.failed = failed


def _fit(contribution: merge.Contribution, room: int) -> None:
    """Leave out of a contribution what has no room."""
    for name, piece in list(contribution.pieces.items()):
        room -= len(piece.text)
        if room < 0:
            del contribution.pieces[name]
            contribution.drop(merge.LIMIT, piece.series)
