"""The graph op that replaces a site: select blocks by the budget, then compute attention over them.

Schema and fake live here with torch alone; kernels are imported when the op runs. The budget travels as text: it is
part of the graph, so two budgets can never share a compiled graph or a cache entry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from sparsepass.errors import KernelInputError
from sparsepass.graph import torch_private
from sparsepass.graph.canonical import SDPA
from sparsepass.kernels.attend.api import block_sparse_attention, is_empty, kernel_name, nothing_seen, visible_blocks
from sparsepass.kernels.mass.api import kept_mass
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.types import Visible
from sparsepass.methods import Dense, Full, Method, decode_budget, make_method
from sparsepass.methods.rows import decode_rows, dial_table, is_row_text
from sparsepass.rewriting import counters
from sparsepass.types import UNBOUNDED

_library = torch.library.Library("sparsepass", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? q_segments, Tensor? kv_segments, float scale,"
    " int left, int right, bool bottom_right, str budget, int slot, Tensor? rows=None, float? softcap=None,"
    " Tensor? slopes=None, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "watched_attention(Tensor query, Tensor key, Tensor value, Tensor? q_segments, Tensor? kv_segments, float scale,"
    " int left, int right, bool bottom_right, str budget, int slot, Tensor? rows=None, float? softcap=None,"
    " Tensor? slopes=None, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None, *, int sampled)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_FULL = Full()
SPARSE_ATTENTION = torch.ops.sparsepass.attention.default
WATCHED_ATTENTION = torch.ops.sparsepass.watched_attention.default


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_segments: torch.Tensor | None,
    kv_segments: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    budget: str,
    slot: int,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over the blocks that ``budget`` selects.

    query [B, H, Sq, D], key [B, Hkv, Skv, D] and value [B, Hkv, Skv, Dv] of one dtype (fp16, bf16, fp32), any strides;
    segments int32 [B, Sq] and [B, Skv]. ``softcap`` to ``sinks``: the fields of ``kernels.scores.Scores``.
    ``budget``: a method's text form, or that of ``RowBudgets``, from which ``rows`` picks (class numbers int32 [B], the
    places in ``TASKS``), or a table of these, ``high=text;...;*=text``, from which the real key length picks.
    Returns [B, H, Sq, Dv] laid out as [B, Sq, H, Dv].
    """
    return _attend(
        query,
        key,
        value,
        q_segments,
        kv_segments,
        scale,
        left,
        right,
        bottom_right,
        budget,
        slot,
        rows,
        softcap,
        slopes,
        bias,
        mask,
        sinks,
    )[0]


def _watched_attention(query: torch.Tensor, *arguments: Any, sampled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_attention``, and the share of the attention mass that ``sampled`` query rows kept: float32 [B, H, sampled],
    NaN where a row sees nothing, 1 where the attention is dense."""
    out, mass = _attend(query, *arguments, sampled=sampled)
    return out, query.new_ones(query.shape[0], query.shape[1], sampled, dtype=torch.float32) if mass is None else mass


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_segments: torch.Tensor | None,
    kv_segments: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    budget: str,
    slot: int,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    sampled: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and where rows are sampled and blocks were left out, what those rows kept."""
    text = text_for(budget, key.shape[2])
    method = method_of(text)
    if scale < 0:  # a dynamic number: the kernels take those from 0 on
        query, scale = -query, -scale
    offset = key.shape[2] - query.shape[2] if bottom_right else 0
    scores = Scores(softcap if softcap is None else abs(softcap), slopes, bias, mask, sinks)
    if method is None and scores.given:  # SDPA has no soft cap and no sinks, and would need a tensor for the rest
        text, method = _FULL.text(), _FULL
    if method is None:
        out = _dense(query, key, value, q_segments, kv_segments, scale, left, right, offset)
        return out.transpose(1, 2).contiguous().transpose(1, 2), None
    if is_empty(query, key, value):
        return nothing_seen(query, value), None
    counter = counters.row(query.device, slot)
    visible = Visible(left, right, offset, q_segments, kv_segments)
    if scores.hides:
        block = method.list_block(query.device)
        blocks = visible_blocks(query, key, scores, visible, q_block=block, kv_block=block)
        visible = replace(visible, blocks=blocks)
    dial = None
    if is_row_text(text):
        if rows is None or rows.shape[0] != query.shape[0]:
            raise KernelInputError(
                f"{'No' if rows is None else rows.shape[0]} class numbers for a batch of {query.shape[0]} rows; "
                "accepted is one per row (sparsepass.task was given a list of another length)."
            )
        table = dial_table(text, query.shape[1], query.device)
        dial = None if table is None else table.index_select(0, rows)
    lists = method.select(query, key, scale=scale, visible=visible, counter=counter, dial=dial)
    out, lse = block_sparse_attention(
        query,
        key,
        value,
        lists,
        scale=scale,
        visible=visible,
        scores=scores,
        counter=counter,
        return_lse=sampled > 0,
        check_values=not type(method).__module__.startswith("sparsepass.methods."),
    )
    if slot not in counters.kernels:
        counters.kernels[slot] = kernel_name(query, key, value, lists, scale=scale, scores=scores)
    if lse is None or method.computes_all:
        return out, None
    return out, kept_mass(query, key, lse, count=sampled, scale=scale, visible=visible, scores=scores)


def prepare(text: str, heads: int | None, device: torch.device) -> None:
    """Put on the device what the op needs there under a budget text: nothing may be allocated inside a CUDA graph.

    ``heads``: None where their number is known only when the op runs.
    """
    counters.prepare(device)
    for one in [entry.split("=", 1)[1] for entry in text.split(";")] if ";" in text else [text]:
        if heads is not None and is_row_text(one):
            dial_table(one, heads, device)
        method = method_of(one)
        if method is not None:
            method.prepare(device)


def text_for(text: str, kv_len: int) -> str:
    """The part of a budget text that holds at this key length."""
    for entry in text.split(";") if ";" in text else ():
        high, chosen = entry.split("=", 1)
        if high == "*" or kv_len <= int(high):
            return chosen
    return text


@functools.lru_cache(maxsize=4096)
def method_of(text: str) -> Method | None:
    """The method that a budget text of one length stands for, of a mixed batch the cap; None for dense."""
    method = make_method(decode_rows(text).cap if is_row_text(text) else decode_budget(text))
    return None if isinstance(method, Dense) else method


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_segments: torch.Tensor | None,
    kv_segments: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    offset: int,
) -> torch.Tensor:
    """The dense kernel, for lengths that could not be decided when the graph was compiled."""
    gqa = query.shape[1] != key.shape[1]
    if kv_segments is None and left == UNBOUNDED and offset == 0 and right in (UNBOUNDED, 0):
        return SDPA(query, key, value, scale=scale, is_causal=right == 0, enable_gqa=gqa)
    rows = torch.arange(query.shape[2], device=query.device)[:, None] + offset
    columns = torch.arange(key.shape[2], device=query.device)[None, :]
    visible = torch.ones(rows.shape[0], columns.shape[1], dtype=torch.bool, device=query.device)
    if right != UNBOUNDED:
        visible &= columns <= rows + right
    if left != UNBOUNDED:
        visible &= columns >= rows - left
    mask = visible[None, None]
    if kv_segments is not None:
        queries = q_segments[:, :, None] if q_segments is not None else kv_segments.new_zeros(())
        mask = mask & (queries == kv_segments[:, None, :])[:, None]
    out = SDPA(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # rows that see nothing give 0, as the kernels do


def refuse_derivatives(arguments: Iterable[tuple[str, Any]]) -> None:
    """Raises ``KernelInputError`` where a derivative would be lost: the kernels compute none."""
    if not torch_private.derivatives_wanted():
        return
    for name, given in arguments:
        if not isinstance(given, torch.Tensor):
            continue
        backward = torch.is_grad_enabled() and given.requires_grad
        if backward or forward_ad.unpack_dual(given).tangent is not None:
            needs = "requires gradients" if backward else "carries a forward-mode derivative"
            raise KernelInputError(
                f"{name} {needs}, and block-sparse attention computes none; call it under torch.no_grad() or with "
                "detached tensors, or use scaled_dot_product_attention to train."
            )


def _without_derivatives(operator: Any, *arguments: Any, **named: Any) -> Any:
    """The operator's autograd kernel."""
    if torch_private.derivatives_wanted():  # the names take longer than the check
        names = [argument.name for argument in operator._schema.arguments]
        refuse_derivatives([*zip(names, arguments, strict=False), *named.items()])
    with torch_private.below_autograd():
        return operator(*arguments, **named)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)


def _watched_fake(query: torch.Tensor, *rest: Any, sampled: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads = query.shape[:2]
    return _fake(query, *rest), query.new_empty(batch, heads, sampled, dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("watched_attention", _watched_attention, _device)
for _operator in (SPARSE_ATTENTION, WATCHED_ATTENTION):
    _library.impl(_operator, functools.partial(_without_derivatives, _operator), "Autograd")
torch.library.register_fake("sparsepass::attention", _fake, lib=_library)
torch.library.register_fake("sparsepass::watched_attention", _watched_fake, lib=_library)


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
