"""Modules of the standard library that others import but an engine seldom uses: loaded on first use.

asyncio imports `inspect`, `linecache` and `traceback` for its messages about errors, and `subprocess` imports `locale`.
With what they import themselves (ast, dis, tokenize, ...) they are 1.2 MB and ten milliseconds of each engine. Parts of
asyncio itself that engines do without (TLS, programs, typing for timeouts) are another 0.8 MB and four milliseconds.
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

PARTS_UNUSED_BY_ENGINES: dict[str, tuple[str, ...]] = {
    "asyncio.sslproto": (),
    "asyncio.staggered": (),
    "asyncio.subprocess": (),
    "asyncio.timeouts": ("timeout", "timeout_at"),
}
"""Submodules, likewise. ``from NAME import *``, which their package says, takes these functions and nothing else."""


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
        _set_aside(module, functions)
        sys.modules[name] = module


def defer_parts(modules: Mapping[str, tuple[str, ...]] = PARTS_UNUSED_BY_ENGINES) -> None:
    """The same for submodules, once their packages are imported.

    Args:
        modules: Their full names, each with the functions of it that its package passes on.
    """
    sys.meta_path.insert(0, _Parts(modules))


class _Parts:
    """Finds submodules that are to be loaded on first use.

    Args:
        modules: See `defer_parts`.
    """

    __slots__ = ("_modules",)

    def __init__(self, modules: Mapping[str, tuple[str, ...]]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """What imports the submodule; None for a module that is not to be deferred."""
        if name not in self._modules:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Later(spec.loader, self._modules[name])  # type: ignore[assignment]
                return spec
        return None


class _Later:
    """Makes a module without executing it.

    Args:
        loader: Executes it.
        functions: See `defer_parts`.
    """

    __slots__ = ("_functions", "_loader")

    def __init__(self, loader: Any, functions: tuple[str, ...]) -> None:
        self._loader = loader
        self._functions = functions

    def create_module(self, spec: Any) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`: put it off."""
        spec: Any = module.__dict__["__spec__"]
        spec.loader = module.__loader__ = self._loader
        _set_aside(module, self._functions)
        module.__dict__["__all__"] = self._functions


def _set_aside(module: ModuleType, functions: tuple[str, ...]) -> None:
    module.__dict__["__deferred__"] = _Loading()
    for function in functions:
        module.__dict__[function] = _caller(module, function)
    module.__class__ = _Deferred


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
