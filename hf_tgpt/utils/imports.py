"""What is to happen when another package is imported, without importing it first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
    """Finds one package as Python would, and has it loaded by a loader that calls back."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # or it would find itself
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # whoever only asks whether there is such a package does not import it
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
        module.__spec__.loader = module.__loader__ = self.loader  # as if nobody had been waiting
        if self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
        self.loader.exec_module(module)
        self.watch.then()
