"""Other implementations of attention, if they are installed, and the hook to add one.

Dense kernels of PyTorch and FlexAttention are in ``measure/bench/baselines.py``. Here are packages that may or may not
be there.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import OptionError, close_names
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.problem import Problem

Call = Callable[[], Tensor]


class Does(StrEnum):
    """What an implementation computes, which decides what it is checked against."""

    DENSE = "dense"
    """Causal dense attention."""
    LISTS = "lists"
    """Attention over the block lists given, exactly."""
    APPROXIMATE = "approximate"
    """Causal attention by a choice, or a precision, of its own: its error is reported, not judged."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An implementation to time beside ours.

    ``build(problem, lists)`` returns a call without arguments whose result is the output [B, H, S, D], or raises
    ``OptionError`` saying why it does not take the problem. ``lists`` is None unless ``does`` is ``lists``. What
    ``build`` does is not timed. ``module``: what must be importable; empty for nothing.
    """

    name: str
    does: Does
    build: Callable[[Problem, BlockLists | None], Call]
    module: str = ""

    @property
    def installed(self) -> bool:
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            return False


_peers: dict[str, Peer] = {}


def register_peer(peer: Peer) -> Peer:
    """Add an implementation, or replace the one of its name. A file that calls this is given by ``--peer-file``.

    Raises ``OptionError`` if ``does`` is none of ``Does``.
    """
    if peer.does not in tuple(Does):
        raise OptionError(f"Peer {peer.name!r} does {peer.does!r}. {close_names(str(peer.does), tuple(Does))}")
    _peers[peer.name] = peer
    return peer


def installed_peers() -> list[Peer]:
    """The registered peers whose package is there."""
    return [peer for peer in _peers.values() if peer.installed]


def load_peers(file: Path) -> None:
    """Run a file that registers peers. Raises ``OptionError`` if it cannot be read."""
    if not file.is_file():
        raise OptionError(f"--peer-file {str(file)!r} is no file; give a Python file that calls register_peer.")
    runpy.run_path(str(file))


def _half_on_cuda(problem: Problem) -> None:
    if problem.device.type != "cuda" or problem.shape.torch_dtype == torch.float32:
        raise OptionError("it takes fp16 and bf16 on a CUDA device")


def _flash_attn(problem: Problem, lists: BlockLists | None) -> Call:
    _half_on_cuda(problem)
    flash_attn_func: Any = importlib.import_module("flash_attn").flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (problem.query, problem.key, problem.value))

    def run() -> Tensor:
        out: Tensor = flash_attn_func(q, k, v, softmax_scale=problem.shape.scale, causal=True)
        return out.transpose(1, 2)

    return run


def _flash_attn_3(problem: Problem, lists: BlockLists | None) -> Call:
    _half_on_cuda(problem)
    flash_attn_func: Any = importlib.import_module("flash_attn_interface").flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (problem.query, problem.key, problem.value))

    def run() -> Tensor:
        out: Any = flash_attn_func(q, k, v, softmax_scale=problem.shape.scale, causal=True)
        made: Tensor = out[0] if isinstance(out, tuple) else out  # it has returned both
        return made.transpose(1, 2)

    return run


def _block_sparse_attn(problem: Problem, lists: BlockLists | None) -> Call:
    _half_on_cuda(problem)
    block_sparse_attn_func: Any = importlib.import_module("block_sparse_attn").block_sparse_attn_func

    shape = problem.shape
    if lists is None or lists.q_block != 128 or lists.kv_block != 128 or shape.batch != 1 or shape.head_dim > 128:
        raise OptionError("it takes lists of 128 by 128 blocks, batch 1 and head sizes to 128")
    q, k, v = (x.transpose(1, 2)[0].contiguous() for x in (problem.query, problem.key, problem.value))
    blocks = -(-shape.length // 128)
    used = torch.arange(lists.kv_indices.shape[3], device=problem.device) < lists.kv_num_blocks[..., None]
    mask = torch.zeros(*lists.kv_num_blocks.shape, blocks + 1, dtype=torch.bool, device=problem.device)
    mask.scatter_(-1, torch.where(used, lists.kv_indices.long(), blocks), True)
    base = mask[..., :blocks].expand(1, shape.heads, -1, -1).contiguous()
    ends = torch.tensor([0, shape.length], dtype=torch.int32, device=problem.device)
    kinds = torch.ones(shape.heads, dtype=torch.int32, device=problem.device)  # every head by its blocks

    def run() -> Tensor:
        out: Tensor = block_sparse_attn_func(
            q, k, v, ends, ends, kinds, None, base, shape.length, shape.length, 0.0,
            deterministic=True, softmax_scale=shape.scale, is_causal=True,
        )  # fmt: skip
        return out[None].transpose(1, 2)

    return run


def _sparge(problem: Problem, lists: BlockLists | None) -> Call:
    _half_on_cuda(problem)
    spas_sage2_attn_meansim_topk_cuda: Any = importlib.import_module("spas_sage_attn").spas_sage2_attn_meansim_topk_cuda

    q = problem.query.contiguous()
    k, v = (x.contiguous() for x in problem.repeated())

    def run() -> Tensor:
        out: Tensor = spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=0.5, is_causal=True)
        return out

    return run


for _peer in (
    Peer("flash_attn", Does.DENSE, _flash_attn, "flash_attn"),
    Peer("flash_attn_3", Does.DENSE, _flash_attn_3, "flash_attn_interface"),
    Peer("block_sparse_attn", Does.LISTS, _block_sparse_attn, "block_sparse_attn"),
    Peer("spas_sage_attn", Does.APPROXIMATE, _sparge, "spas_sage_attn"),
):
    register_peer(_peer)
