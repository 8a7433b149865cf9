"""Modules of the standard library that others import but an engine seldom uses: loaded on first use.

asyncio imports `inspect`, `linecache` and `traceback` for its messages about errors, and `subprocess` imports `locale`.
With what they import themselves (ast, dis, tokenize, ...) they are 1.2 MB and ten milliseconds of each engine.
"""

from __future__ import annotations

import sys
from importlib import _bootstrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

UNUSED_BY_ENGINES: dict[str, tuple[str, ...]] = {
    "inspect": (),
    "linecache": (),
    "locale": (),
    "traceback": (
        "extract_stack",
    ),  # asyncio's part in C takes it when it is imported, and calls it in debug mode
}
"""Imported with asyncio, and used when something has gone wrong, or in debug mode. With each, the functions that are
only taken from it at that time."""


class _Deferred(type(sys)):  # type: ignore[misc]  # types.ModuleType, without an import of types
    """A module that is executed when one of its attributes is asked for; from then on an ordinary one."""

    def __getattr__(self, name: str) -> Any:
        if name != "__path__":  # `from NAME import ...` asks whether this is a package: it is not
            _load(self)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


class _Loading:
    """Whether a module's execution has begun; entered by one thread at a time, by that one again while it executes."""

    __slots__ = ("_lock", "begun")

    def __init__(self) -> None:
        import _thread

        self._lock = _thread.RLock()
        self.begun = False

    def __enter__(self) -> _Loading:
        self._lock.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.release()


def defer(modules: Mapping[str, tuple[str, ...]] = UNUSED_BY_ENGINES) -> None:
    """Have the next ``import`` of some modules make an empty one, which fills itself when it is first used.

    ``from NAME import ...`` is a use. A module that is loaded already stays as it is, as does one that is not found.

    Args:
        modules: Names of top-level modules, each with functions of it that may be taken from it without using it.
    """
    for name, functions in modules.items():
        spec = None if name in sys.modules else _bootstrap._find_spec(name, None)  # type: ignore[attr-defined]
        if spec is None:
            continue
        module: ModuleType = _bootstrap.module_from_spec(spec)
        module.__dict__["__deferred__"] = _Loading()
        for function in functions:
            module.__dict__[function] = _caller(module, function)
        module.__class__ = _Deferred
        sys.modules[name] = module


def _caller(module: ModuleType, function: str) -> Callable[..., Any]:
    """What stands for a function of a module that is not loaded; calling it loads the module."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        _load(module)
        return module.__dict__[function](*arguments, **keywords)

    return call


def _load(module: ModuleType) -> None:
    """Execute a deferred module, unless that has been done."""
    loading: _Loading = module.__dict__["__deferred__"]
    with loading:
        if loading.begun:
            return
        loading.begun = True
        module.__dict__["__spec__"].loader.exec_module(module)
        module.__class__ = type(sys)
