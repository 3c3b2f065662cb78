"""Everything that touches private torch API: guards, symbolic lengths, cloning, the recompile limit, Inductor's entry.

Written against torch 2.11 to 2.14; a change there breaks here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

log = logging.getLogger("sparsepass")

RECOMPILE_LIMIT = 64
"""Dynamo's own limit is 8 for all of transformers' models together; ``generate`` takes three graphs a plan."""

_compiled = 0


def compile_count() -> int:
    """Graphs that the sparsepass backend has compiled in this process."""
    return _compiled


def count_compile() -> None:
    global _compiled
    _compiled += 1
    _threads.add(threading.get_ident())
    if len(_threads) > 1:
        _keep_order_of_graphs()


_threads: set[int] = set()
"""Threads that have compiled."""


@functools.cache
def _keep_order_of_graphs() -> None:
    """Have Dynamo look for the graph of a call in a fixed order from now on.

    Dynamo moves the graph that it finds to the front, while other threads that check guards stand in the same list:
    guards release the GIL. These threads then miss graphs that are there and compile them again, up to the recompile
    limit (seen with torch 2.13, 8 threads: 62 graphs where 27 were needed). One thread alone loses nothing by the
    moves, so the order is only fixed once a second thread has compiled.
    """
    if (set_lru := getattr(torch._C._dynamo.eval_frame, "_set_lru_cache", None)) is not None:
        set_lru(False)


def graphs_of(fn: Callable[..., Any]) -> Sequence[Any]:
    """What Dynamo holds for the code of a function: an entry for each graph, in the order in which calls look."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    entries: list[Any] = _debug_get_cache_entry_list(fn.__code__)
    return entries


def graph_breaks() -> Counter[str]:
    """Graph breaks of this process so far: how many for each reason, in one line each."""
    from torch._dynamo.utils import counters

    found: Counter[str] = Counter()
    for reason, count in counters["graph_break"].items():
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        found[lines[0] if lines else "of unknown reason"] += count
    return found


def raise_recompile_limit() -> None:
    """Make room for one graph per (length bucket, plan), in every thread. A limit that the user set stays.

    The default is raised, not the value: values are kept per context (torch 2.13), so that a thread started later would
    not see one that was set here.
    """
    entry = torch._dynamo.config._config["recompile_limit"]
    if entry.default < RECOMPILE_LIMIT:
        log.debug("raising torch._dynamo.config.recompile_limit from %d to %d", entry.default, RECOMPILE_LIMIT)
        entry.default = RECOMPILE_LIMIT


def traced_by_running() -> bool:
    """Whether what runs now in this thread is traced: by ``torch.export`` or ``make_fx``, which run the code itself."""
    tensors = sys.modules.get("torch.fx.experimental.proxy_tensor")  # who traces has imported it
    return tensors is not None and tensors.get_proxy_mode() is not None


@contextlib.contextmanager
def annotated(notes: dict[str, str]) -> Iterator[None]:
    """Nodes traced inside, by running, carry these notes in ``meta["custom"]``.

    Torch keeps the notes in force for the whole process. The lock that Dynamo traces under is held meanwhile, so that
    the graph of another thread does not get them.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, torch.fx.traceback.preserve_node_meta(), torch.fx.traceback.annotate(notes):
        yield


def install_plan_guard(registry_key: str) -> str:
    """Guard the frame being compiled on ``sparsepass.plan_keys[registry_key]()``; returns the guard's text.

    ``ImportSource`` takes the top package only, so the registry has to be reachable as an attribute of ``sparsepass``.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource, DictGetItemSource, ImportSource

    registry = AttrSource(ImportSource("sparsepass"), "plan_keys")
    source = CallFunctionNoArgsSource(DictGetItemSource(registry, registry_key))
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
    return f"sparsepass.plan_keys[{registry_key!r}]()"


class ObjectGuard:
    """A guard on what a variable of the captured frame holds, by a function of ours.

    ``passed()`` says whether it held just before the compiled graph was called: a guard that a filter or a stance has
    dropped is not asked, and then it is False.
    """

    _seen = threading.local()

    def __init__(self, root: str, check: Callable[[Any], bool], text: str) -> None:
        self.root = root
        self.text = text
        self._check = check

    def __call__(self, held: Any) -> bool:
        if not self._check(held):
            return False
        self._marks().add(self)
        return True

    @classmethod
    def all_passed(cls, guards: Sequence[ObjectGuard]) -> bool:
        """Whether all of them held since this was last asked in this thread."""
        seen = cls._marks()
        passed = seen.issuperset(guards)
        seen.clear()
        return passed

    @classmethod
    def _marks(cls) -> set[ObjectGuard]:
        marks: set[ObjectGuard] | None = getattr(cls._seen, "marks", None)
        if marks is None:
            marks = cls._seen.marks = set()
        return marks

    def install(self) -> None:
        """Guard the frame being compiled."""
        from torch._dynamo.guards import install_guard

        install_guard(_root_source(self.root).make_guard(self._build))

    def _build(self, builder: Any, guard: Any) -> None:
        from torch._dynamo.guards import get_verbose_code_parts

        manager, words = builder.get_guard_manager(guard), get_verbose_code_parts(self.text, guard)
        try:
            manager.add_lambda_guard(self, words, guard.user_stack)
        except TypeError:  # torch 2.11 takes no stack
            manager.add_lambda_guard(self, words)


def root_object(root: str) -> Any:
    """What a variable of the frame being compiled holds, by the name of its source: ``L['self']``, ``G['model']``.

    None where no frame is being compiled, or it has no such variable.
    """
    output = _frame_output()
    if output is None:
        return None
    scope = output.local_scope if root.startswith("L[") else output.global_scope
    return scope.get(root[3:-2])


def frame_modules() -> list[torch.nn.Module]:
    """The modules that the frame being compiled holds in variables of its own, such as its ``self``."""
    output = _frame_output()
    held = () if output is None else tuple(output.local_scope.values())
    return [one for one in held if isinstance(one, torch.nn.Module)]


def only_module() -> str:
    """The name, as of ``root_object``, of the one variable that holds a module in the frame being compiled.

    Empty where there is none, or where there are several.
    """
    output = _frame_output()
    scope = {} if output is None else output.local_scope
    names = [name for name, held in scope.items() if isinstance(held, torch.nn.Module)]
    return f"L['{names[0]}']" if len(names) == 1 else ""


def _frame_output() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:  # nothing is being compiled: the backend was called by hand
        return None


def _root_source(root: str) -> Any:
    from torch._dynamo.source import GlobalSource, LocalSource

    name = root[3:-2]
    return LocalSource(name) if root.startswith("L[") else GlobalSource(name)


def hint_value(length: int | torch.SymInt) -> int | None:
    """The size this call came with, or None for an unbacked symbol. Installs no guard."""
    if isinstance(length, int):
        return length
    node = length.node
    return int(node.hint) if node.has_hint() else None


def typical_value(size: int | torch.SymInt) -> int:
    """The size this call came with, or one that an unbacked symbol may have: for orders of magnitude. No guard."""
    if (known := hint_value(size)) is not None:
        return known
    assert isinstance(size, torch.SymInt)  # a number is known
    return int(size.node.expr.xreplace(dict.fromkeys(size.node.expr.free_symbols, 4096)))


def can_guard(length: int | torch.SymInt) -> bool:
    """Whether a guard may narrow ``length``: not for unbacked symbols, nor where the user fixed the range.

    ``mark_dynamic(min=, max=)`` raises ConstraintViolationError on a narrower guard.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if isinstance(length, int):
        return True
    if free_unbacked_symbols(length) or hint_value(length) is None:
        return False
    return not (length.node.expr.free_symbols & _fixed_range_symbols(length.node.shape_env))


def can_fix(size: int | torch.SymInt) -> bool:
    """Whether a graph may be guarded to this one size: not an unbacked one, nor one that the user marked dynamic."""
    if isinstance(size, int):
        return True
    return can_guard(size) and not (size.node.expr.free_symbols & _marked_symbols(size.node.shape_env))


def fix(sizes: Iterable[int | torch.SymInt]) -> None:
    """Guard that each of these sizes is what it is in this call."""
    for size in sizes:
        int(size)


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Operators that are called inside skip their autograd kernel."""
    guard: contextlib.AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def tensor_kind(held: Any) -> str | None:
    """What a value is that is more than a plain tensor: the name of its subclass, or a level of a transform.

    None for plain and fake tensors, parameters, and for what is no tensor.
    """
    if not isinstance(held, torch.Tensor):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(held):
        return "tensor of a torch.func transform"
    kind = type(held)
    if kind is torch.Tensor or kind in (torch.nn.Parameter, torch.nn.Buffer):
        return None
    from torch._subclasses.fake_tensor import FakeTensor

    return None if kind is FakeTensor else kind.__name__


def derivatives_wanted() -> bool:
    """Whether gradients are recorded, or a level of forward-mode differentiation is open."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def holds(condition: Any) -> bool:
    """Whether a condition on sizes is true whatever the sizes are. Installs no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


@contextlib.contextmanager
def suppressed_guards(shape_env: Any) -> Iterator[None]:
    """What is computed inside on symbolic sizes installs no guard."""
    if shape_env is None:
        yield
        return
    from torch.fx.experimental.symbolic_shapes import _suppress_guards

    with _suppress_guards(shape_env):
        yield


def size_reader(graph: fx.Graph, size: int | torch.SymInt) -> Callable[[Sequence[Any]], int] | None:
    """How to tell a size of a captured graph from the arguments of a call; None where they do not say."""
    if isinstance(size, int):
        return lambda arguments: size
    wanted = size.node.expr
    places: dict[Any, Callable[[Sequence[Any]], int]] = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        held = node.meta.get("example_value")
        if isinstance(held, torch.SymInt):
            places.setdefault(held.node.expr, functools.partial(_argument, index))
        elif isinstance(held, torch.Tensor):
            for dim, length in enumerate(held.shape):
                if isinstance(length, torch.SymInt):
                    places.setdefault(length.node.expr, functools.partial(_argument_size, index, dim))
    if wanted in places:
        return places[wanted]
    symbols = sorted(wanted.free_symbols, key=str)
    if not all(symbol in places for symbol in symbols):
        return None

    @functools.lru_cache(maxsize=256)
    def evaluate(values: tuple[int, ...]) -> int:
        return int(wanted.xreplace(dict(zip(symbols, values, strict=True))))

    return lambda arguments: evaluate(tuple(places[symbol](arguments) for symbol in symbols))


def _argument(index: int, arguments: Sequence[Any]) -> int:
    return int(arguments[index])


def _argument_size(index: int, dim: int, arguments: Sequence[Any]) -> int:
    return int(arguments[index].shape[dim])


def guard_range(length: torch.SymInt, low: int, high: int | None) -> tuple[str, ...]:
    """Guard ``low < length <= high``, which the current size must satisfy; returns the texts of what was added."""
    added = []
    for condition, text in (
        (length > low, f"{length} > {low}"),
        (high is None or length <= high, f"{length} <= {high}"),
    ):
        if condition is True or holds(condition):
            continue
        if not bool(condition):
            raise RuntimeError(f"{text} does not hold for the current size: a bug in sparsepass")
        added.append(text)
    return tuple(added)


def _fixed_range_symbols(shape_env: Any) -> set[Any]:
    from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint

    return _constrained_symbols(shape_env, lambda given: isinstance(given, StrictMinMaxConstraint))


def _marked_symbols(shape_env: Any) -> set[Any]:
    """Sizes of which Dynamo must not become sure: ``mark_dynamic``."""
    return _constrained_symbols(shape_env, lambda given: given is not None and not given.warn_only)


def _constrained_symbols(shape_env: Any, wanted: Callable[[Any], bool]) -> set[Any]:
    fixed: set[Any] = set()
    for tracked in shape_env.tracked_fakes or ():
        constraints = getattr(getattr(tracked, "symbolic_context", None), "constraint_sizes", None)
        if constraints is None or not isinstance(tracked.fake, torch.Tensor):
            continue
        for dim, constraint in enumerate(constraints):
            size = tracked.fake.shape[dim]
            if wanted(constraint) and isinstance(size, torch.SymInt):
                fixed |= size.node.expr.free_symbols
    return fixed


def clone(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy of a captured graph, safe to rewrite, and the copy of each node. Dynamo keeps referring to the original."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    if output is not None:
        graph.output(output)
    old = next(iter(reversed(gm.graph.nodes)))
    new = next(iter(reversed(graph.nodes)))
    new.meta.update(old.meta)
    for original, copy in copies.items():
        if hasattr(original, "_dynamo_source"):
            copy._dynamo_source = original._dynamo_source  # type: ignore[attr-defined]
    # Lazily, as Dynamo makes its own: Python code for the copy is written when it is called or printed, which Inductor
    # does neither. It would take half the time of the whole pass, twice.
    twin: fx.GraphModule = _make_graph_module(gm, graph, type(gm).__name__)
    twin.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(twin, name, getattr(gm, name))
    return twin, copies


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None) -> Callable[..., Any]:
    """Compile with Inductor, the user's own options passed on."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(gm, list(inputs), config_patches=patches or None)
    return compiled


def inductor_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for ``mode=`` and ``options=``; the latter wins. Raises KeyError for an unknown one."""
    import torch._inductor as inductor_package
    from torch._inductor import config

    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        modes = inductor_package.list_mode_options()
        if mode not in modes:
            raise KeyError(mode)
        patches.update(modes[mode])
    known = config.get_config_copy()
    for name, setting in options.items():
        plain = name.replace("-", "_")
        if plain not in known:
            raise KeyError(name)
        patches[plain] = setting
    return patches


def known_inductor_options() -> Iterable[str]:
    from torch._inductor import config

    return tuple(config.get_config_copy())


def known_inductor_modes() -> Iterable[str]:
    import torch._inductor as inductor_package

    return tuple(inductor_package.list_mode_options())


def forget() -> None:
    """Drop every compiled frame of this process: for measurements that compile one model after the other."""
    torch._dynamo.reset()


def fused_attention(gm: fx.GraphModule, examples: Sequence[Any]) -> int:
    """How many attention sites Inductor's own ``fuse_attention`` replaces in a graph; no code is generated."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    before = counters["inductor"]["fuse_attention"]
    twin, _ = clone(gm)
    compile_fx(twin, list(examples), inner_compile=lambda inner, *args, **kwargs: inner.forward)
    return int(counters["inductor"]["fuse_attention"] - before)
