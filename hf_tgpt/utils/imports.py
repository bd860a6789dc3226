"""Hooks into imports: a call once a package is imported, and a suggestion for a name that it lacks."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Calls `then()` once the package `name` has been imported; now, if it has been already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch(MetaPathFinder):
    """Finds one package as Python would, and gives it a loader that calls back."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # otherwise it would find itself
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # a caller may only check whether there is such a package
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingBack(spec.loader, self)
        return spec


class _CallingBack(Loader):
    def __init__(self, loader: Loader, watch: _Watch):
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # it has just been found
        module.__spec__.loader = module.__loader__ = self.loader  # as if no hook had been set
        if self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
        self.loader.exec_module(module)
        self.watch.then()


def missing(package: str, name: str, known: Iterable[str]) -> str:
    """The message that a package lacks a name, with the nearest one that it has; ignores case and underscores."""
    by_letters = {_letters(other): other for other in known}
    near = difflib.get_close_matches(_letters(name), by_letters, n=1, cutoff=0.8)
    return f"module {package!r} has no attribute {name!r}" + (f"; did you mean {by_letters[near[0]]}?" if near else "")


def _letters(name: str) -> str:
    return name.lower().replace("_", "")


class SuggestNames(MetaPathFinder):
    """Makes `from package import Name` raise an ImportError that suggests the nearest name in the package.

    Python replaces the message of a module's AttributeError there, but first looks for a submodule of this name. This
    finder must be the last one, so that it is only called for names that do not exist.
    """

    def __init__(self, package: str, known: Iterable[str]):
        self.package, self.known = package, known

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        package, _, name = fullname.rpartition(".")
        message = missing(package, name, self.known) if package == self.package else ""
        if message.endswith("?"):
            raise ImportError(f"cannot import name {name!r}: {message}", name=package)
