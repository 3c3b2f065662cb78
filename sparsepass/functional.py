"""Block-sparse attention for those who call it themselves: block lists in FlexAttention's form, packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sparsepass.errors import KernelInputError
from sparsepass.graph import torch_private
from sparsepass.kernels.arguments import check_block_sizes, check_cumulative, check_list_values, check_tensor
from sparsepass.kernels.attend.api import block_sparse_attention, check_inputs, is_empty, visible_blocks
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.select.api import select_pooled_topk
from sparsepass.kernels.support import default_block
from sparsepass.kernels.types import UNBOUNDED, BlockLists, Visible
from sparsepass.methods.heads import float32_at_most
from sparsepass.rewriting.ops import default_scale, refuse_derivatives

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def segments_from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Segment numbers int32 [1, length] of a packed row, from cumulative lengths [n + 1] (0 first), as in varlen APIs.

    Tokens from the last boundary on get -1: they are padding. No host synchronization.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise KernelInputError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; accepted is one dimension of at least two entries, "
            "0 first: the cumulative lengths of the packed sequences."
        )
    check_cumulative(cu_seqlens)
    places = torch.arange(length, device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens.to(torch.int64), places, right=True) - 1
    inside = (places < cu_seqlens[-1]) & (numbers >= 0)
    return torch.where(inside, numbers, -1).to(torch.int32)[None]


def from_block_mask(block_mask: BlockMask) -> BlockLists:
    """Block lists of a FlexAttention ``BlockMask``: its partial and its full blocks together.

    The kernels apply causality, windows and segments by position, not ``mask_mod``: say them to ``sparse_attention``.
    """
    q_block, kv_block = (int(size) for size in block_mask.BLOCK_SIZE)
    check_block_sizes(q_block, kv_block)
    blocks = -(-int(block_mask.seq_lengths[1]) // kv_block)
    partial = _dense_rows(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    if block_mask.full_kv_num_blocks is not None:
        assert block_mask.full_kv_indices is not None  # BlockMask holds both or neither
        partial = partial | _dense_rows(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    return BlockLists(*lists_from_mask(partial), q_block, kv_block)


def to_block_mask(lists: BlockLists, q_len: int, kv_len: int, mask_mod: Any = None) -> BlockMask:
    """The FlexAttention ``BlockMask`` of block lists, for ``flex_attention`` or for other kernels that take one.

    Raises ``KernelInputError`` for lists with columns.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if lists.columns is not None:
        raise KernelInputError("These lists have columns, which a BlockMask cannot hold; it names whole blocks.")
    blocks = -(-kv_len // lists.kv_block)
    num, indices = lists_from_mask(_dense_rows(lists.kv_num_blocks, lists.kv_indices, blocks))
    return BlockMask.from_kv_blocks(
        num, indices, BLOCK_SIZE=(lists.q_block, lists.kv_block), mask_mod=mask_mod, seq_lengths=(q_len, kv_len)
    )


def lists_from_mask(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kv_num_blocks`` and ``kv_indices`` (int32) of a boolean block map [B, H, nq, nkv]; indices ascend."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32)


def _dense_rows(num: torch.Tensor, indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Lists as a map, bool [B, H, nq, blocks]. On CUDA values are not looked at; blocks that do not exist are left out.

    Raises ``KernelInputError``.
    """
    check_tensor("kv_num_blocks", num, ((), (), ()), torch.int32, num.device)
    check_tensor("kv_indices", indices, (*((n,) for n in num.shape), ()), torch.int32, num.device)
    if num.device.type == "cpu":
        check_list_values(num, indices, blocks)
    listed = torch.arange(indices.shape[-1], device=num.device) < num[..., None]
    held = torch.zeros(*num.shape, blocks + 1, dtype=torch.bool, device=num.device)
    places = torch.where(listed & (indices >= 0) & (indices < blocks), indices.to(torch.int64), blocks)
    return held.scatter_(-1, places, listed)[..., :-1]


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: BlockLists | BlockMask | None = None,
    *,
    density: float | Sequence[float] | torch.Tensor | None = None,
    max_density: float | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    key_padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention, blocks given or selected by pooled block top-k at ``density``.

    ``density``: the share of the visible blocks to compute, above 0 and at most 1: one number, a list of one per row of
    the batch, or float32 [B], [B, 1], [B, H] or [1, H] on the device. A tensor's values are not looked at, since that
    would wait for the device: ``max_density`` (default 1) sizes the lists, and what is over it is cut to it.

    query [B, H, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv]: fp16, bf16 or fp32, any strides. ``causal``: the
    last query stands at the last key (queries are a suffix of the keys). ``window``: with ``causal``, keys seen
    including its own; without, keys to either side. ``key_padding``: bool [B, Skv], True is a real key. ``segments``:
    integer [B, S], attention stays within equal numbers; ``cu_seqlens``: the same as cumulative lengths, batch 1.
    ``softcap``, ``slopes`` (ALiBi), ``bias``, ``mask`` (bool, True is visible) and ``sinks`` change the scores as
    ``kernels.scores.Scores`` says; blocks of which mask and bias hide every pair are not computed, and ``density`` is
    then of each head's other blocks. Returns the output [B, H, Sq, Dv], and with ``return_lse`` the log-sum-exp float32
    [B, H, Sq]; rows that see nothing give 0 and -inf. There are no derivatives: tensors that need gradients, or carry
    forward-mode ones, are refused, and so are tensor subclasses and torch.func transforms. Raises
    ``KernelInputError``. Method: The Sparse Frontier (arXiv 2504.17768), block-sparse.
    """
    if (blocks is None) == (density is None):
        raise KernelInputError("Give either blocks (lists, or a BlockMask) or density, not both and not neither.")
    given = {"query": query, "key": key, "value": value, "slopes": slopes, "bias": bias, "mask": mask, "sinks": sinks}
    _check_plain(given)
    refuse_derivatives(given.items())
    check_inputs(query, key, value)
    visible = _visible(query, key, causal, window, key_padding, segments, cu_seqlens)
    factor = default_scale(query.shape[-1] or 1) if scale is None else _number(scale, "scale")
    scores = Scores(softcap, slopes, bias, mask, sinks)
    if scores.hides and blocks is None and not is_empty(query, key, value):
        block = default_block(query.device)
        shown = visible_blocks(query, key, scores, visible, q_block=block, kv_block=block)
        visible = replace(visible, blocks=shown)
    if blocks is None:
        share, most = _density(density, max_density, query)
        lists = select_pooled_topk(query, key, scale=factor, visible=visible, density=share, max_density=most)
    else:
        lists = _lists(blocks)
    out, lse = block_sparse_attention(
        query, key, value, lists, scale=factor, visible=visible, scores=scores, return_lse=return_lse,
        check_values=blocks is not None,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def _lists(blocks: Any) -> BlockLists:
    if isinstance(blocks, BlockLists):
        return blocks
    if not hasattr(blocks, "kv_num_blocks"):
        raise KernelInputError(f"blocks is of type {type(blocks).__name__}; accepted are BlockLists and a BlockMask.")
    return from_block_mask(blocks)


def _number(given: Any, name: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise KernelInputError(f"{name} is {given!r}; accepted is a number.")
    return float(given)


def _check_plain(given: Mapping[str, Any]) -> None:
    if torch.compiler.is_dynamo_compiling():
        return  # Dynamo's own values stand for the tensors, and it cannot trace the question
    for name, tensor in given.items():
        if (kind := torch_private.tensor_kind(tensor)) is not None:
            raise KernelInputError(
                f"{name} is a {kind}; accepted are plain tensors, outside of torch.vmap and the like."
            )


def _density(
    density: float | Sequence[float] | torch.Tensor | None, max_density: float | None, query: torch.Tensor
) -> tuple[float | torch.Tensor, float | None]:
    """The density as a number, or as float32 [B or 1, H or 1] with its greatest value."""
    batch, heads = query.shape[:2]
    if isinstance(density, torch.Tensor):
        shares = density[:, None] if density.dim() == 1 else density
        if shares.dim() != 2 or shares.shape[0] not in (1, batch) or shares.shape[1] not in (1, heads):
            raise KernelInputError(
                f"density has shape {tuple(density.shape)}; accepted is [{batch}] (one per row), [{batch}, {heads}] "
                f"or [1, {heads}]."
            )
        return shares, 1.0 if max_density is None else _share(max_density, "max_density")
    if max_density is not None:
        raise KernelInputError("max_density goes with a tensor of densities; other densities are known as they are.")
    if not isinstance(density, Sequence):
        return _share(density, "density"), None
    if len(density) != batch:
        raise KernelInputError(f"{len(density)} densities for a batch of {batch} rows; accepted is one per row.")
    rows = [_share(one, f"density[{row}]") for row, one in enumerate(density)]
    # Rounded down, as float32 asks for a block more where the share of a number of blocks is a whole number.
    host = torch.tensor([[float32_at_most(one)] for one in rows], dtype=torch.float32, device="cpu")
    if query.device.type == "cuda":
        host = host.pin_memory()
    return host.to(query.device, non_blocking=True), max(rows)


def _check_integers(name: str, given: Any, query: torch.Tensor) -> None:
    """Raises ``KernelInputError`` unless ``given`` holds bools or integers (of int32) on query's device."""
    if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.is_complex():
        kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise KernelInputError(f"{name} is {kind}; accepted is a tensor of bools or integers.")
    if given.device != query.device:
        raise KernelInputError(f"{name} is on {given.device} and query on {query.device}; give both on one device.")
    if given.device.type == "cpu" and given.dtype == torch.int64 and given.numel():
        least, most = (int(one) for one in given.aminmax())
        if not -(2**31) <= least <= most < 2**31:
            raise KernelInputError(f"{name} has values from {least} to {most}; accepted is what int32 holds.")


def _share(given: Any, name: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
        raise KernelInputError(f"{name} is {given!r}; accepted is a share above 0 and at most 1.")
    return float(given)


def _visible(
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    window: int | None,
    key_padding: torch.Tensor | None,
    segments: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Visible:
    q_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and (type(window) is not int or window < 1):
        raise KernelInputError(f"window is {window!r}; accepted is a whole number of keys, 1 or more.")
    if segments is not None and cu_seqlens is not None:
        raise KernelInputError("Give segments or cu_seqlens, not both: they say the same thing.")
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, query)
        if query.shape[0] != 1:
            raise KernelInputError(f"cu_seqlens needs batch 1 (one packed row); query has batch {query.shape[0]}.")
        segments = segments_from_cu_seqlens(cu_seqlens, kv_len)
    if segments is not None and (q_len != kv_len or tuple(segments.shape) != (query.shape[0], kv_len)):
        raise KernelInputError(
            f"segments of shape {tuple(segments.shape)} for {q_len} queries and {kv_len} keys; "
            f"accepted is [{query.shape[0]}, {kv_len}] with as many queries as keys."
        )
    if key_padding is not None and tuple(key_padding.shape) != (query.shape[0], kv_len):
        raise KernelInputError(
            f"key_padding has shape {tuple(key_padding.shape)}; accepted is [{query.shape[0]}, {kv_len}]."
        )
    for name, given in (("segments", segments), ("key_padding", key_padding)):
        if given is not None:
            _check_integers(name, given, query)
    kv_segments = None if segments is None else segments.to(torch.int32)
    q_segments = None if kv_segments is None else torch.where(kv_segments < 0, -2, kv_segments)  # padding sees nothing
    if key_padding is not None:
        real = key_padding.to(torch.bool)
        numbers = torch.zeros_like(real, dtype=torch.int32) if kv_segments is None else kv_segments
        kv_segments = torch.where(real, numbers, -1)
    left = UNBOUNDED if window is None else window - 1 if causal else window
    right = 0 if causal else UNBOUNDED if window is None else window
    return Visible(left, right, kv_len - q_len if causal else 0, q_segments, kv_segments)
