"""What a calibration holds for: the model and its weights, its dtype, the version of the methods."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sparsepass.host.environment import device_of, package_version
from sparsepass.methods import METHODS_VERSION
from sparsepass.policies.policy import Policy
from sparsepass.types import AttentionSite

SAMPLED = 64
"""Values of each parameter that are looked at, spread evenly over it."""

NAMES = {
    "weights": "the model's weights",
    "architecture": "the model's architecture",
    "dtype": "the dtype",
    "methods": "the version of the selection methods",
    "device": "the kind of device",
}

_warned: set[tuple[str, ...]] = set()


def fingerprint(model: Any) -> dict[str, Any]:
    """Architecture, a digest of configuration and weights, dtype, device type, and versions: plain JSON."""
    first = next(iter(model.parameters()), None)
    config = getattr(model, "config", None)
    return {
        "architecture": str(getattr(config, "model_type", type(model).__name__)),
        "weights": _digest(model),
        "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
        "device": device_of(model).type,
        "methods": METHODS_VERSION,
        "sparsepass": package_version(),
    }


def differences(calibrated: Mapping[str, Any], model: Any) -> list[str]:
    """In what a model differs from the one that was calibrated, as words; empty if in nothing that matters."""
    mine = fingerprint(model)
    return [
        f"{words} ({calibrated[name]}, here {mine[name]})"
        for name, words in NAMES.items()
        if name in calibrated and calibrated[name] != mine[name]
    ]


def warn_of_sites(policy: Policy, sites: Iterable[AttentionSite]) -> None:
    """Warn, once for each difference, where attention to be planned is not of what a policy was calibrated on.

    A captured graph knows no weights: dtype, kind of device and the methods' version are compared.
    """
    if not policy.calibrated:
        return
    held: dict[str, set[Any]] = {"methods": {METHODS_VERSION}, "dtype": set(), "device": set()}
    for site in sites:
        held["dtype"].add(site.dtype)
        held["device"].add(torch.device(site.device).type)
    for name, mine in held.items():
        other = mine - {policy.calibrated.get(name)}
        if name not in policy.calibrated or not other:
            continue
        key = (policy.name, name, *map(str, sorted(other)))
        if key not in _warned:
            _warned.add(key)
            warnings.warn(
                f"Policy {policy.name!r} was calibrated for another setting: {NAMES[name]} was "
                f"{policy.calibrated[name]}, here it is {', '.join(map(str, sorted(other)))}. Its budgets may not be "
                "safe here; calibrate again.",
                RuntimeWarning,
                stacklevel=2,
            )


def _digest(model: Any) -> str:
    """SHA-256, 16 hex digits, of the configuration's sizes and of some values of every parameter."""
    content = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        some = flat[::step][:SAMPLED].to(device="cpu", dtype=torch.float32)
        content.update(json.dumps([name.removeprefix("_orig_mod."), list(parameter.shape)]).encode())
        content.update(some.numpy().tobytes())
    return content.hexdigest()[:16]
