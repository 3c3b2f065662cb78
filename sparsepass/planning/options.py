"""``options=`` of ``torch.compile``: ours are namespaced and checked, the rest is Inductor's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sparsepass.errors import OptionError, close_names, shown
from sparsepass.graph import torch_private
from sparsepass.planning.site import Settings
from sparsepass.policies.policy import resolve_policy
from sparsepass.request.hints import resolve_hints

PREFIX = "sparsepass."
POLICY = "sparsepass.policy"
TASK = "sparsepass.task"
ALWAYS_SPARSE = "sparsepass.always_sparse"
INDUCTOR = "sparsepass.inductor"

KNOWN: dict[str, str] = {
    POLICY: "a Policy, the path of a policy file, 'prior' or 'published' (default: $SPARSEPASS_POLICY, else the prior)",
    TASK: "the hint (or a list, one per row) where no sparsepass.task(...) is in force (default: the hardest)",
    ALWAYS_SPARSE: "True: sparse wherever the policy says so, even where it was measured to be slower",
    INDUCTOR: "False: run the rewritten graph as it is, without Inductor (for inspection and tests)",
}

DISABLE_VARIABLE = "SPARSEPASS_DISABLE"


def disabled() -> bool:
    """Whether the environment turns sparsepass off; the backend is then plain Inductor."""
    return os.environ.get(DISABLE_VARIABLE, "").lower() not in ("", "0", "false", "no")


def parse(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any], bool]:
    """Settings of a compiled region, Inductor's configuration, and whether Inductor is wanted at all.

    Raises ``OptionError`` for a name or value that is not accepted, ``PolicyError`` and ``HintError`` for theirs.
    """
    own = {name: given for name, given in (options or {}).items() if name.startswith(PREFIX)}
    rest = {name: given for name, given in (options or {}).items() if not name.startswith(PREFIX)}
    for name in own:
        if name not in KNOWN:
            raise OptionError(f"Unknown option {shown(name)}. {close_names(name, KNOWN)}")
    try:
        patches = torch_private.inductor_options(mode, rest)
    except KeyError as error:
        raise _not_inductors(error.args[0], mode) from None
    task = own.get(TASK)
    settings = Settings(
        policy=resolve_policy(own.get(POLICY)),
        task=None if task is None else resolve_hints(task),
        always_sparse=_flag(ALWAYS_SPARSE, own.get(ALWAYS_SPARSE, False)),
    )
    return settings, patches, _flag(INDUCTOR, own.get(INDUCTOR, True))


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise OptionError(f"Option {name!r} is {shown(given)}; accepted are True and False.")
    return given


def _not_inductors(name: str, mode: str | None) -> OptionError:
    if name == mode:
        modes = ["default", *torch_private.known_inductor_modes()]
        return OptionError(f"Unknown mode {shown(name)}. {close_names(name, modes)}")
    near = close_names(name, [*KNOWN, *torch_private.known_inductor_options()]).split(" Known:")[0]
    own = "; ".join(f"{key}: {text}" for key, text in KNOWN.items())
    return OptionError(
        f"Unknown option {shown(name)}: neither Inductor's nor one of sparsepass's. {near}\nOurs are: {own}"
    )
