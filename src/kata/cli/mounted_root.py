"""A container's root file system, mounted by an agent: for the commands that look into it or copy from and to it."""

from __future__ import annotations

from contextlib import contextmanager

from kata.engine.client import EngineClient

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kata.cli.records import Container


@contextmanager
def mounted_root(container: Container) -> Iterator[EngineClient]:
    """Provide an engine whose agent has mounted the container's root file system.

    A container that runs has one. For one that does not, a machine is booted, which is gone at the end.

    Raises:
        KataError: The machine cannot be booted, or was lost.
    """
    if container.running():
        with EngineClient(container.socket) as engine:
            yield engine
        return
    from kata.cli import session

    yield from session.booted_for_copy(container)
