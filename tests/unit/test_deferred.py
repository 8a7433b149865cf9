"""Modules that are loaded on first use; each test in an interpreter of its own, since modules belong to all of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


def printed_by(program: str) -> list[str]:
    """The lines that a program prints, with ``kata.deferred.defer`` at hand."""
    start = f"import sys; sys.path.append({str(SOURCE)!r})\nfrom kata.deferred import defer\n"
    command = ["/usr/bin/python3", "-I", "-S", "-c", start + program]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()


def test_a_module_is_loaded_by_its_first_use() -> None:
    program = """
defer()
import inspect
print("ast" in sys.modules)
print(inspect.isfunction(defer), "ast" in sys.modules, type(inspect).__name__)
import inspect as again
print(again is inspect, inspect.__name__, hasattr(inspect, "no such thing"))
"""
    assert printed_by(program) == ["False", "True True module", "True inspect False"]


def test_a_function_may_be_taken_from_it_without_use() -> None:
    program = """
defer()
from traceback import extract_stack
print("textwrap" in sys.modules)
print(extract_stack()[0].lineno, "textwrap" in sys.modules)
import traceback
print(traceback.extract_stack is extract_stack, traceback.extract_stack()[0].name)
"""
    assert printed_by(program) == ["False", "7 True", "False <module>"]


def test_what_is_loaded_or_missing_stays_as_it_is() -> None:
    program = """
import textwrap
defer({"textwrap": (), "no_such_module": ()})
print(type(textwrap).__name__, "no_such_module" in sys.modules)
"""
    assert printed_by(program) == ["module False"]


def test_threads_that_use_it_at_once_all_see_it_whole() -> None:
    program = """
import threading
defer()
import inspect
ready = threading.Barrier(8)
found = []
def use():
    ready.wait()
    found.append((inspect.signature, inspect.currentframe, inspect.Traceback))
threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)))
"""
    assert printed_by(program) == ["8 1"]


def test_parts_of_a_package_are_loaded_by_their_first_use() -> None:
    program = """
from kata.deferred import defer_parts
defer_parts()
import asyncio
print("typing" in sys.modules, type(asyncio.sslproto).__name__, hasattr(asyncio, "create_subprocess_exec"))
async def late():
    async with asyncio.timeout(0.01):
        await asyncio.sleep(60)
try:
    asyncio.run(late())
except TimeoutError:
    print("typing" in sys.modules, type(asyncio.timeouts).__name__)
async def runs():
    program = await asyncio.subprocess.create_subprocess_exec("true")
    return await program.wait()
print(asyncio.run(runs()), asyncio.sslproto.SSLProtocol.__name__, asyncio.staggered.__spec__.name)
"""
    assert printed_by(program) == [
        "False _Deferred False",
        "True module",
        "0 SSLProtocol asyncio.staggered",
    ]
