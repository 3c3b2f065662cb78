"""Names that public modules had before they moved: each still imports, as the very module of today's name.

So what is set on a module under its old name is set for all. Nothing is loaded until it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType

MOVED = {
    "sparsepass.auto": "sparsepass.measure.auto",
    "sparsepass.bench": "sparsepass.measure.bench",
    "sparsepass.calibrate": "sparsepass.measure.calibrate",
    "sparsepass.canon": "sparsepass.graph.canonical",
    "sparsepass.counters": "sparsepass.rewriting.counters",
    "sparsepass.coverage": "sparsepass.measure.coverage",
    "sparsepass.crossover": "sparsepass.planning.crossover",
    "sparsepass.dynamo": "sparsepass.graph.torch_private",
    "sparsepass.environment": "sparsepass.host.environment",
    "sparsepass.fingerprint": "sparsepass.policies.fingerprint",
    "sparsepass.hints": "sparsepass.request.hints",
    "sparsepass.inspection": "sparsepass.reports.explain",
    "sparsepass.kernels.cpu_build": "sparsepass.kernels.runtime.build",
    "sparsepass.kernels.dispatch": "sparsepass.kernels.attend.api",
    "sparsepass.kernels.dispatch_select": "sparsepass.kernels.select.api",
    "sparsepass.match": "sparsepass.patterns.pattern",
    "sparsepass.models": "sparsepass.measure.models",
    "sparsepass.monitor": "sparsepass.monitoring.monitor",
    "sparsepass.ops": "sparsepass.rewriting.ops",
    "sparsepass.options": "sparsepass.planning.options",
    "sparsepass.plan": "sparsepass.planning.plan",
    "sparsepass.policy": "sparsepass.policies.policy",
    "sparsepass.policy_file": "sparsepass.policies.file",
    "sparsepass.policy_rules": "sparsepass.policies.rule",
    "sparsepass.record": "sparsepass.rewriting.record",
    "sparsepass.report": "sparsepass.reports.report",
    "sparsepass.report_table": "sparsepass.reports.table",
    "sparsepass.tasks": "sparsepass.measure.tasks",
    "sparsepass.testbed": "sparsepass.measure.testbed",
    "sparsepass.tune": "sparsepass.measure.tune",
}


def place_of(name: str) -> str | None:
    """Today's name of a module by the name it had, that of a package for what is in it; None for any other name."""
    head = name
    while head.startswith("sparsepass."):
        if head in MOVED:
            return MOVED[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return None


class _Alias(InspectLoader):
    """Loads the module of today's name in place of a new one."""

    def __init__(self, place: ModuleSpec) -> None:
        self.place = place

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.place.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m``."""
        loader = self.place.loader
        return loader.get_code(self.place.name) if isinstance(loader, InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:
        loader = self.place.loader
        return loader.get_source(self.place.name) if isinstance(loader, InspectLoader) else None


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = place_of(fullname)
        place = None if name is None else find_spec(name)
        if place is None:
            return None
        package = place.submodule_search_locations is not None
        return ModuleSpec(fullname, _Alias(place), origin=place.origin, is_package=package)


def install() -> None:
    """Give loaded modules their old names, and let Python find the others when they are asked for."""
    # Before the finder of folders: it would load a package's modules a second time, under the old name.
    sys.meta_path.insert(0, _Finder())
    for old, new in MOVED.items():
        if (module := sys.modules.get(new)) is None:
            continue
        sys.modules[old] = module
        parent, _, name = old.rpartition(".")
        if not hasattr(sys.modules[parent], name):  # sparsepass.monitor is a function
            setattr(sys.modules[parent], name, module)
