"""The monitor's own metrics: what it has scraped, and what it costs; described in `families.OF_MONITOR`."""

from __future__ import annotations

import gc
import os
import platform
import resource

from kata import __version__
from kata.engine.factory import pool, pool_counts
from kata.metrics import procfs
from kata.metrics.exposition import Family
from kata.metrics.families import OF_MONITOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kata.metrics.exposition import Label, Sample
    from kata.monitor.outcome import Outcome

BUCKETS_MS = tuple(float(1 << power) for power in range(10))
"""The original's: 1, 2, 4, ..., 512 milliseconds."""


class Figures:
    """What is counted in this process' life.

    Attributes:
        scrapes: Scrapes of the node.
        failed: Sandboxes that gave nothing, added up.
    """

    def __init__(self) -> None:
        self.scrapes = 0
        self.failed = 0
        self._buckets = [0] * (len(BUCKETS_MS) + 1)
        self._milliseconds = 0.0

    def scraped(self, seconds: float) -> None:
        """Count a scrape of the node, and how long it took."""
        took = seconds * 1000
        self._milliseconds += took
        self._buckets[next((i for i, top in enumerate(BUCKETS_MS) if took <= top), len(BUCKETS_MS))] += 1

    def families(self, outcomes: Sequence[Outcome]) -> list[Family]:
        """All of the monitor's families.

        Args:
            outcomes: What this scrape found, one for each sandbox.
        """
        found = [
            _single("running_shim_count", len(outcomes)),
            _single("scrape_count", self.scrapes),
            _single("scrape_failed_count", self.failed),
            _single("build_info", 1, ("version", __version__)),
            self._durations(),
        ]
        return [*found, *_of_sandboxes(outcomes), *_pool(), *_process(), *_python()]

    def _durations(self) -> Family:
        name = "kata_monitor_scrape_durations_histogram_milliseconds"
        samples: list[Sample] = []
        total = 0
        for top, count in zip((*map(str, BUCKETS_MS), "+Inf"), self._buckets, strict=True):
            total += count
            samples.append((f"{name}_bucket", [("le", top)], float(total)))
        samples += [(f"{name}_sum", [], self._milliseconds), (f"{name}_count", [], float(total))]
        return Family(name, OF_MONITOR[name].kind, OF_MONITOR[name].help, samples)


def _family(short: str, values: Sequence[tuple[list[Label], float]]) -> Family:
    definition = OF_MONITOR[f"kata_monitor_{short}"]
    samples: list[Sample] = [(definition.name, labels, value) for labels, value in values]
    return Family(definition.name, definition.kind, definition.help, samples)


def _single(short: str, value: float, *labels: Label) -> Family:
    return _family(short, [(list(labels), float(value))])


def _of_sandboxes(outcomes: Sequence[Outcome]) -> Iterator[Family]:
    answered = [(one.labels, one.contribution) for one in outcomes if one.contribution is not None]
    yield _family("sandbox_up", [(one.labels, float(one.contribution is not None)) for one in outcomes])
    yield _family("sandbox_scrape_seconds", [(one.labels, one.seconds) for one in outcomes])
    yield _family("sandbox_series", [(labels, float(one.series)) for labels, one in answered])
    yield _family(
        "sandbox_series_dropped",
        [
            ([*labels, ("reason", reason)], float(count))
            for labels, one in answered
            for reason, count in sorted(one.dropped.items())
        ],
    )


def _pool() -> Iterator[Family]:
    """Machines that wait for sandboxes, and what has become of those that have."""
    waiting, counts = pool.listed(), pool_counts.read()
    yield _single("pool_machines", len(waiting))
    yield _single("pool_memory_bytes", sum(one["bytes"] for one in waiting))
    yield _single("pool_made_total", counts[pool_counts.MADE])
    yield _single("pool_taken_total", counts[pool_counts.TAKEN])
    yield _single("pool_missed_total", counts[pool_counts.MISSED])
    reasons = pool_counts.by_reason(counts)
    yield _family(
        "pool_dropped_total", [([("reason", reason)], float(count)) for reason, count in reasons.items()]
    )


def _process() -> Iterator[Family]:
    """The usual figures of a process, as of Prometheus' clients, with the original's prefix."""
    own = procfs.ProcessFigures(os.getpid(), "monitor")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    yield _single("process_cpu_seconds_total", own.cpu_s)
    yield _single("process_max_fds", soft)
    yield _single("process_open_fds", own.open_files() or 0)
    yield _single("process_resident_memory_bytes", own.resident_bytes)
    yield _single("process_start_time_seconds", own.started_s)
    yield _single("process_virtual_memory_bytes", own.virtual_bytes)
    yield _single("process_virtual_memory_max_bytes", -1 if most == resource.RLIM_INFINITY else most)


def _python() -> Iterator[Family]:
    """What Python's own client tells of the interpreter, where the original has Go's figures."""
    yield _single(
        "python_info",
        1,
        ("implementation", platform.python_implementation()),
        ("version", platform.python_version()),
    )
    generations = list(enumerate(gc.get_stats()))
    for short, key in (
        ("python_gc_collections_total", "collections"),
        ("python_gc_objects_collected_total", "collected"),
        ("python_gc_objects_uncollectable_total", "uncollectable"),
    ):
        yield _family(
            short, [([("generation", str(number))], float(one[key])) for number, one in generations]
        )
