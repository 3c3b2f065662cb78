"""Block-sparse attention on the CPU in torch operations: gathered key/value blocks and batched matrix products.

Serves where the C++ kernel does not: no compiler, float64, another kind of CPU.

Rows of the block lists (one query block of one head each) are sorted by their count and worked off in chunks of equal
or nearly equal counts: the listed key and value blocks are gathered side by side, then one batched product, softmax
and a second batched product serve the whole chunk. Chunks are cut so that the scores stay in the second-level cache;
long rows are cut into slices merged by a running maximum (online softmax, Milakov and Gimelshein, arXiv 1805.02867).
Only slots in which some pair is hidden are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu.visible import Visibility
from sparsepass.kernels.scores import ALL, Scores, hidden_at_most

_SCORES = 512 * 1024
"""Scores per chunk: 2 MiB in fp32, what two cores hold in their second-level caches."""
_SLICE_KEYS = 2048
"""Keys per slice of a long row: enough for efficient products, few enough that a chunk has several rows."""


def _as_blocks(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[B, H, S, D] as contiguous [B * H * blocks, block * D] of ``dtype``, zeros behind the last token.

    Shares memory with ``x`` where its layout allows.
    """
    batch, heads, length, dim = x.shape
    blocks = -(-length // block)
    if length % block:
        filled = x.new_empty((batch, heads, blocks * block, dim), dtype=dtype)
        filled[:, :, :length] = x
        filled[:, :, length:] = 0
        x = filled
    return x.to(dtype).contiguous().view(batch * heads * blocks, block * dim)


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop`` (exclusive) of the sorted rows, the longest with ``slots`` blocks."""

    start: int
    stop: int
    slots: int


def _chunks(counts: list[int], q_block: int, kv_block: int) -> Iterator[_Chunk]:
    """Cut rows, sorted by falling count, into chunks that waste at most a quarter; rows of count 0 are left out."""
    start = 0
    while start < len(counts) and counts[start]:
        slots = counts[start]
        per_row = q_block * min(slots * kv_block, max(_SLICE_KEYS, kv_block))
        limit = min(len(counts), start + max(1, _SCORES // per_row))
        stop = start + 1
        while stop < limit and 4 * counts[stop] >= 3 * slots:
            stop += 1
        yield _Chunk(start, stop, slots)
        start = stop


def _runs(flags: list[bool], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive true flags within [low, high), relative to ``low``."""
    at = low
    while at < high:
        if not flags[at]:
            at += 1
            continue
        end = at
        while end < high and flags[end]:
            end += 1
        yield at - low, end - low
        at = end


class _Attend:
    """One call: its tensors in block form, its scratch buffers, its outputs."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Visibility,
        scale: float,
        want_lse: bool,
        scores: Scores,
        blocks: Tensor | None,
    ) -> None:
        self.q, self.mask, self.scale, self.scores, self.blocks = q, mask, scale, scores, blocks
        self.batch, self.heads, self.q_len, self.dim = q.shape
        self.kv_heads, self.v_dim = k.shape[1], v.shape[3]
        # Products of 16-bit tensors are 16-bit in torch. A rounded score is a relative error in its weight, and with
        # weights, product and quotient rounded in turn the error is over twice that of dense attention.
        self.work = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.k = _as_blocks(k, mask.kv_block, self.work)
        # 0 * inf is NaN, and hidden pairs have weight 0: non-finite values are added apart, to the rows that see them.
        finite = bool(v.isfinite().all())
        self.v = _as_blocks(v if finite else torch.where(v.isfinite(), v, 0), mask.kv_block, self.work)
        self.v_bad = None if finite else _as_blocks(torch.where(v.isfinite(), 0, v), mask.kv_block, self.work)
        self.out = q.new_empty((self.batch, self.q_len, self.heads, self.v_dim)).transpose(1, 2)
        self.lse = q.new_empty((self.batch, self.heads, self.q_len), dtype=torch.float32) if want_lse else None
        self.buffers: dict[str, Tensor] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer reused over chunks: fresh memory for every chunk would cost a page fault per 4 KiB."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.zeros(size, dtype=dtype)
        return self.buffers[name][:size].view(shape)

    def spans(self, rows: list[int]) -> Iterator[tuple[int, int, int, int, int]]:
        """Runs of consecutive rows of one head: the first's place in ``rows``, batch, head, token range."""
        blocks, first = self.mask.q_blocks, 0
        while first < len(rows):
            end = first + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1 and rows[end] % blocks:
                end += 1
            head, index = divmod(rows[first], blocks)
            low = index * self.mask.q_block
            high = min(low + (end - first) * self.mask.q_block, self.q_len)
            yield first, head // self.heads, head % self.heads, low, high
            first = end

    def run(self, counts: Tensor, indices: Tensor) -> None:
        """``counts`` [B, H, q_blocks] and ``indices`` [B, H, q_blocks, cap] fill ``out`` and ``lse``."""
        mask, cap = self.mask, indices.shape[3]
        counts, indices = counts.long().reshape(-1), indices.long()
        order = torch.argsort(counts, descending=True, stable=True)
        sorted_counts = counts[order]
        listed = indices.reshape(len(order), cap)[order]
        q_index = order % mask.q_blocks
        head = order // mask.q_blocks
        batch = head // self.heads
        kv_head = batch * self.kv_heads + (head % self.heads) // (self.heads // self.kv_heads)

        filled = torch.arange(cap) < sorted_counts[:, None]
        # Entries behind a row's count may hold anything; they are gathered as block 0 and masked away.
        gathered = torch.where(filled, listed, 0)
        if gathered.numel() and not 0 <= int(gathered.min()) <= int(gathered.max()) < mask.kv_blocks:
            raise IndexError(
                f"kv_indices names a block outside 0..{mask.kv_blocks - 1}; build the lists for these lengths"
            )
        partial = ~(filled & mask.is_full(batch[:, None], q_index[:, None], gathered))
        if self.scores.hides and self.blocks is not None:
            states = self.blocks.expand(self.batch, self.heads, -1, -1).flatten(0, 2)[order]
            partial |= states.gather(1, gathered) != ALL
        sources = gathered + kv_head[:, None] * mask.kv_blocks
        listed = torch.where(filled, listed, mask.kv_blocks)

        count_list, rows = sorted_counts.tolist(), order.tolist()
        chunks = list(_chunks(count_list, mask.q_block, mask.kv_block))
        for chunk in chunks:
            part = slice(chunk.start, chunk.stop)
            flags = partial[part, : chunk.slots].any(0).tolist()
            self.chunk(rows[part], sources[part], batch[part], q_index[part], head[part], listed[part], flags)
        done = chunks[-1].stop if chunks else 0
        sinks = self.scores.sinks
        for _, b, h, low, high in self.spans(rows[done:]):
            self.out[b, h, low:high] = 0
            if self.lse is not None:
                self.lse[b, h, low:high] = -torch.inf if sinks is None else sinks[h]

    def chunk(
        self,
        rows: list[int],
        sources: Tensor,
        batch: Tensor,
        q_index: Tensor,
        head: Tensor,
        listed: Tensor,
        flags: list[bool],
    ) -> None:
        """Attend the query blocks ``rows`` to their listed blocks, of which ``flags`` need masking, and store."""
        mask, size, slots = self.mask, len(rows), len(flags)
        queries = self.scratch("q", (size, mask.q_block, self.dim), self.work)
        flat = queries.view(-1, self.dim)
        for first, b, h, low, high in self.spans(rows):
            begin = first * mask.q_block
            # Copied first: a product with 16-bit queries would be rounded to 16 bits before it is stored.
            flat[begin : begin + high - low].copy_(self.q[b, h, low:high]).mul_(self.scale)

        per_slice = max(1, _SLICE_KEYS // mask.kv_block)
        peak = total = value = None
        if self.scores.sinks is not None:  # a key of its own, without a value
            peak = self.scores.sinks.to(self.work)[head % self.heads][:, None, None].expand(-1, mask.q_block, 1)
            total = (peak > -torch.inf).to(self.work)
            peak = peak.clamp(min=torch.finfo(self.work).min)
            value = torch.zeros(size, mask.q_block, self.v_dim, dtype=self.work)
        for low in range(0, slots, per_slice):
            high = min(slots, low + per_slice)
            hidden = []
            for run in _runs(flags, low, high):
                blocks = listed[:, low + run[0] : low + run[1]]
                masked = mask.hidden(batch, q_index, blocks)
                if self.scores.hides:
                    by_scores = self.hidden_by_scores(head, q_index, blocks)
                    masked = by_scores if masked is None else masked | by_scores
                hidden.append((run, masked))
            places = None if self.plain else (head, q_index, listed[:, low:high])
            new = self.slice(queries, sources[:, low:high].reshape(-1), hidden, peak, places)
            if peak is None or total is None or value is None:
                peak, total, value = new
            else:
                fade = torch.exp(peak - new[0])
                total = total * fade + new[1]
                value = torch.addcmul(new[2], value, fade)
                peak = new[0]
        self.store(rows, peak, total, value, any(flags))

    @property
    def plain(self) -> bool:
        """Whether scores only have to be scaled."""
        return self.scores.softcap is None and self.scores.slopes is None and self.scores.bias is None

    def at_pairs(self, x: Tensor, head: Tensor, q_index: Tensor, blocks: Tensor) -> Tensor:
        """x [B or 1, H or 1, Sq or 1, Skv or 1] at every pair of rows of blocks: [R, q_block or 1, n * kv_block or 1].

        Tokens past the end come out as anything.
        """
        item, own = head // self.heads, head % self.heads
        rows = q_index[:, None] * self.mask.q_block + torch.arange(self.mask.q_block)
        keys = (blocks[:, :, None] * self.mask.kv_block + torch.arange(self.mask.kv_block)).flatten(1)
        places = []
        for dim, index in enumerate((item[:, None, None], own[:, None, None], rows[:, :, None], keys[:, None, :])):
            size = x.shape[dim]
            places.append(index.clamp(max=size - 1) if size > 1 else torch.zeros((1, 1, 1), dtype=torch.int64))
        return x[tuple(places)]

    def hidden_by_scores(self, head: Tensor, q_index: Tensor, blocks: Tensor) -> Tensor:
        """Bool, broadcastable to [R, q_block, n * kv_block]: pairs that mask or bias hide."""
        found = torch.zeros((), dtype=torch.bool)
        if self.scores.mask is not None:
            found = ~self.at_pairs(self.scores.mask, head, q_index, blocks)
        if self.scores.bias is not None:
            bias = self.at_pairs(self.scores.bias, head, q_index, blocks)
            found = found | (bias <= hidden_at_most(bias.dtype))
        return found

    def change(self, scores: Tensor, head: Tensor, q_index: Tensor, blocks: Tensor) -> None:
        """Soft cap, slopes and bias on scaled scores [R, q_block, n * kv_block], in place."""
        cap = self.scores.softcap
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        if self.scores.slopes is not None:
            slopes = self.scores.slopes.to(self.work).expand(self.batch, -1).flatten()[head][:, None, None]
            rows = q_index[:, None] * self.mask.q_block + torch.arange(self.mask.q_block) + self.mask.offset
            keys = (blocks[:, :, None] * self.mask.kv_block + torch.arange(self.mask.kv_block)).flatten(1)
            scores.add_((keys[:, None, :] - rows[:, :, None]) * slopes)
        if self.scores.bias is not None:
            scores.add_(self.at_pairs(self.scores.bias, head, q_index, blocks))

    def slice(
        self,
        queries: Tensor,
        sources: Tensor,
        hidden: list[tuple[tuple[int, int], Tensor | None]],
        peak: Tensor | None,
        places: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, sum of weights [R, q_block, 1] and weighted values [R, q_block, Dv] over one slice of the slots.

        ``places``: heads and query blocks of the rows [R] and their key blocks [R, n], where scores are changed.
        """
        mask, size = self.mask, queries.shape[0]
        width = sources.numel() // size * mask.kv_block
        keys = self.scratch("k", (sources.numel(), mask.kv_block * self.dim), self.work)
        torch.index_select(self.k, 0, sources, out=keys)
        scores = self.scratch("s", (size, mask.q_block, width), self.work)
        torch.bmm(queries, keys.view(size, width, self.dim).transpose(1, 2), out=scores)
        if places is not None:
            self.change(scores, *places)
        for (low, high), masked in hidden:
            if masked is not None:
                scores[:, :, low * mask.kv_block : high * mask.kv_block].masked_fill_(masked, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        if peak is not None:
            top = torch.maximum(top, peak)
        if hidden:
            # A row with nothing visible so far: any finite maximum gives it weights of exactly 0.
            top = top.masked_fill_(top == -torch.inf, torch.finfo(self.work).min)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        values = self.scratch("v", (sources.numel(), mask.kv_block * self.v_dim), self.work)
        torch.index_select(self.v, 0, sources, out=values)
        product = torch.bmm(weights, values.view(size, width, self.v_dim))
        if self.v_bad is not None:
            product = product + self.bad_values(sources, hidden, (size, width))
        return top, total, product

    def bad_values(
        self, sources: Tensor, hidden: list[tuple[tuple[int, int], Tensor | None]], shape: tuple[int, int]
    ) -> Tensor:
        """Sum of the non-finite values that each query sees, 0 where it sees none: [R, q_block, Dv]."""
        size, width = shape
        sight = torch.ones((size, self.mask.q_block, width), dtype=self.work)
        for (low, high), masked in hidden:
            if masked is not None:
                sight[:, :, low * self.mask.kv_block : high * self.mask.kv_block].masked_fill_(masked, 0)
        if self.v_bad is None:
            return torch.zeros(())
        bad = self.v_bad.index_select(0, sources).view(size, width, self.v_dim)
        total = torch.zeros(())
        for sign in (torch.inf, -torch.inf):
            reached = torch.bmm(sight, ((bad == sign) | bad.isnan()).to(self.work))
            total = total + torch.where(reached > 0, sign, 0.0)
        return total

    def store(
        self, rows: list[int], peak: Tensor | None, total: Tensor | None, value: Tensor | None, masked: bool
    ) -> None:
        """Normalize and write one chunk's rows."""
        if peak is None or total is None or value is None:
            return
        part = total.reciprocal()
        if masked:
            part.masked_fill_(total == 0, 0)
        normal = (value * part).view(-1, self.v_dim)
        lse = (peak + total.log()).view(-1) if self.lse is not None else None
        for first, b, h, low, high in self.spans(rows):
            begin = first * self.mask.q_block
            self.out[b, h, low:high] = normal[begin : begin + high - low]
            if self.lse is not None and lse is not None:
                self.lse[b, h, low:high] = lse[begin : begin + high - low]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    mask: Visibility,
    scale: float,
    want_lse: bool,
    scores: Scores,
    blocks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Out like ``q`` and the log-sum-exp; ``counts`` [B, H, q_blocks], ``indices`` [B, H, q_blocks, cap] expanded.

    Raises:
        IndexError: a listed block is outside the keys.
    """
    call = _Attend(q, k, v, mask, scale, want_lse, scores, blocks)
    call.run(counts, indices)
    return call.out, call.lse
