"""Modules that have moved can still be imported, and unpickled from, under their old names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Moved(MetaPathFinder, Loader):
    """Finds modules by their old names and hands out the module of the new name itself."""

    def __init__(self, homes: Mapping[str, str]) -> None:
        self.homes = homes
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.homes else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.homes[spec.name])
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import machinery has just written the old name's spec into the module
        old = module.__spec__
        if old is not None:
            module.__spec__ = self.specs.pop(old.name)


def keep_old_names(homes: Mapping[str, str]) -> None:
    """Let modules be imported by the names that they had.

    Args:
        homes: Old absolute names and the absolute names of today.
    """
    sys.meta_path.append(_Moved(homes))
