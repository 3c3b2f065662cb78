"""Attention written at random from a grammar of spellings, and near misses that mean something else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

T = torch.Tensor
BATCH, HEADS, LENGTH, DIM, VALUE_DIM = 2, 4, 80, 16, 8
Step = Callable[[T, "Tensors"], T]


@dataclass(frozen=True)
class Tensors:
    """What an attention is made of: query [B, H, S, D], key and value [B, Hkv, S, ..], and what acts on its scores."""

    q: T
    k: T
    v: T
    seen: T
    """bool [B, 1, 1, S]: the first half of the keys at least."""
    bias: T
    """[1, H, S, S]."""
    slopes: T
    """[H, 1, 1]."""
    sinks: T
    """[H]."""

    @property
    def all(self) -> tuple[T, ...]:
        return self.q, self.k, self.v, self.seen, self.bias, self.slopes, self.sinks


def tensors(seed: int, groups: int = 1, value_dim: int = DIM) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=draw)
    k = torch.randn(BATCH, HEADS // groups, LENGTH, DIM, generator=draw)
    v = torch.randn(BATCH, HEADS // groups, LENGTH, value_dim, generator=draw)
    seen = torch.rand(BATCH, 1, 1, LENGTH, generator=draw) > 0.3
    seen[..., : LENGTH // 2] = True
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, generator=draw)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None].float()
    return Tensors(q, k, v, seen, bias, slopes, torch.randn(HEADS, generator=draw))


# Repetition of keys and values


def expanded(x: T) -> T:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, HEADS // h, s, d).reshape(b, HEADS, s, d)


def interleaved(x: T) -> T:
    return x.repeat_interleave(HEADS // x.shape[1], dim=1)


REPEATS: dict[str, Callable[[T], T]] = {"expand": expanded, "interleave": interleaved}

# The product of queries and keys

PRODUCTS: dict[str, Callable[[T, T], T]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-2, -1)),
    "operator": lambda q, k: q @ k.mT,
    "method": lambda q, k: q.matmul(k.permute(0, 1, 3, 2)),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "einsum_blhd": lambda q, k: torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2)),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.zeros(BATCH * HEADS, LENGTH, LENGTH), q.reshape(-1, LENGTH, DIM), k.reshape(-1, LENGTH, DIM).mT, beta=0.0
    ).reshape(BATCH, HEADS, LENGTH, LENGTH),
    "float": lambda q, k: torch.matmul(q.float(), k.float().transpose(2, 3)),
}
SCALES: dict[str, Step] = {
    "mul": lambda s, t: s * 0.25,
    "rmul": lambda s, t: 0.25 * s,
    "div": lambda s, t: s / 4.0,
    "torch_div": lambda s, t: torch.div(s, 4),
    "in_place": lambda s, t: s.mul_(0.25),
    "divided_in_place": lambda s, t: s.div_(4.0),
    "tensor": lambda s, t: s / torch.full([], 4.0),
    "none": lambda s, t: s,
}
CAPS: dict[str, Step] = {
    "cap": lambda s, t: torch.tanh(s / 5.0) * 5.0,
    "method": lambda s, t: 5.0 * (s / 5.0).tanh(),
}


def later() -> T:
    i = torch.arange(LENGTH)
    return i[None, :] > i[:, None]


def additive(hidden: T) -> T:
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


MASKS: dict[str, Step] = {
    "causal_add": lambda s, t: s + torch.full((LENGTH, LENGTH), float("-inf")).triu(1),
    "causal_fill": lambda s, t: s.masked_fill(later(), float("-inf")),
    "causal_fill_in_place": lambda s, t: s.masked_fill_(later(), torch.finfo(s.dtype).min),
    "causal_where": lambda s, t: torch.where(~later(), s, torch.finfo(s.dtype).min),
    "causal_where_tensor": lambda s, t: torch.where(later(), torch.tensor(float("-inf")), s),
    "causal_tril": lambda s, t: s.masked_fill(torch.ones(LENGTH, LENGTH).tril() == 0, -1e9),
    "causal_minus": lambda s, t: s - 10000.0 * later().float(),
    "padding_add": lambda s, t: s + (~t.seen).float() * torch.finfo(s.dtype).min,
    "padding_fill": lambda s, t: s.masked_fill(~t.seen, float("-inf")),
    "padding_where": lambda s, t: torch.where(t.seen, s, -1e9),
    "bias": lambda s, t: s + t.bias,
    "bias_first": lambda s, t: t.bias + s,
    "minus": lambda s, t: s - t.bias,
    "alibi": lambda s, t: s + t.slopes * (torch.arange(LENGTH) - LENGTH + 1),
    "both": lambda s, t: s + (t.bias + additive(later())),
    "window": lambda s, t: s.masked_fill((torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() > 9, -1e9),
    "chunks": lambda s, t: s.masked_fill(torch.arange(LENGTH)[:, None] // 16 != torch.arange(LENGTH) // 16, -1e9),
    "documents": lambda s, t: s + additive(t.seen != t.seen.mT),
    "constant": lambda s, t: s + 3.0,
}


def over_sum(weights: T) -> T:
    return weights / weights.sum(dim=-1, keepdim=True)


SOFTMAXES: dict[str, Callable[[T], T]] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "typed": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "method": lambda s: s.softmax(-1),
    "torch": lambda s: torch.softmax(s, dim=3),
    "less_maximum": lambda s: F.softmax(s - s.max(dim=-1, keepdim=True).values, dim=-1),
    "less_amax": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "float": lambda s: s.float().softmax(dim=-1).type_as(s),
    "module": lambda s: torch.nn.Softmax(dim=-1)(s),
    "less_logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)),
    "log_softmax": lambda s: F.log_softmax(s, dim=-1).exp(),
    "over_sum": lambda s: over_sum(torch.exp(s - s.amax(dim=-1, keepdim=True))),
    "merged": lambda s: F.softmax(s.view(BATCH * HEADS, LENGTH, -1), -1).view(BATCH, HEADS, LENGTH, -1),
}


SINKS: dict[str, Callable[[Tensors], T]] = {
    "head": lambda t: t.sinks.reshape(1, -1, 1, 1).expand(BATCH, -1, LENGTH, -1),
    "query": lambda t: t.q[..., :1],
    "item": lambda t: t.q[:, :1, :1, :1].expand(-1, HEADS, LENGTH, -1),
    "query_of_every_head": lambda t: t.q[:, :1, :, :1].expand(-1, HEADS, -1, -1),
}


def with_sinks(s: T, t: Tensors, sinks: str, softmax: Callable[[T], T]) -> T:
    return softmax(torch.cat([s, SINKS[sinks](t)], dim=-1))[..., :-1]


AFTER: dict[str, Callable[[T], T]] = {
    "nothing": lambda p: p,
    "dropout": lambda p: F.dropout(p, p=0.1, training=False),
    "contiguous": lambda p: p.contiguous(),
}
VALUES: dict[str, Callable[[T, T], T]] = {
    "matmul": lambda p, v: torch.matmul(p, v),
    "operator": lambda p, v: (p @ v).transpose(1, 2).contiguous(),
    "einsum": lambda p, v: torch.einsum("bhij,bhjd->bhid", p, v),
    "einsum_bihd": lambda p, v: torch.einsum("bhij,bhjd->bihd", p, v),
    "einsum_blhd": lambda p, v: torch.einsum("bhij,bjhd->bihd", p, v.transpose(1, 2)),
    "bmm": lambda p, v: torch.bmm(p.reshape(-1, LENGTH, LENGTH), v.reshape(BATCH * HEADS, LENGTH, -1)),
    "bmm_view": lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(BATCH, HEADS, LENGTH, -1),
}


@dataclass(frozen=True)
class Spelling:
    """One way to write attention; call it on the tensors."""

    product: str = "matmul"
    scale: str = "mul"
    cap: str | None = None
    masks: tuple[str, ...] = ()
    softmax: str = "function"
    sinks: str | None = None
    after: str = "nothing"
    values: str = "matmul"
    repeat: str | None = None
    scale_first: bool = True
    value_dim: int = field(default=DIM)

    @property
    def tensors(self) -> Callable[[int], Tensors]:
        return functools.partial(tensors, groups=1 if self.repeat is None else 2, value_dim=self.value_dim)

    def __call__(self, *given: T) -> T:
        t = Tensors(*given)
        k, v = (t.k, t.v) if self.repeat is None else (REPEATS[self.repeat](t.k), REPEATS[self.repeat](t.v))
        s = PRODUCTS[self.product](t.q, k)
        steps = [SCALES[self.scale], *(() if self.cap is None else (CAPS[self.cap],))]
        masks = [MASKS[name] for name in self.masks]
        for step in [*steps, *masks] if self.scale_first or self.cap is not None else [*masks, *steps]:
            s = step(s, t)
        softmax = SOFTMAXES[self.softmax]
        p = with_sinks(s, t, self.sinks, softmax) if self.sinks else softmax(s)
        return VALUES[self.values](AFTER[self.after](p), v)


def spellings() -> st.SearchStrategy[Spelling]:
    """Any of them. A softmax of scores [B * H, S, S] and sinks do not go together."""

    def fits(one: Spelling) -> bool:
        return not (one.sinks and one.softmax == "merged")

    return st.builds(
        Spelling,
        product=st.sampled_from(list(PRODUCTS)),
        scale=st.sampled_from(list(SCALES)),
        cap=st.one_of(st.none(), st.sampled_from(list(CAPS))),
        masks=st.lists(st.sampled_from(list(MASKS)), max_size=2, unique=True).map(tuple),
        softmax=st.sampled_from(list(SOFTMAXES)),
        sinks=st.one_of(st.none(), st.sampled_from(list(SINKS))),
        after=st.sampled_from(list(AFTER)),
        values=st.sampled_from(list(VALUES)),
        repeat=st.one_of(st.none(), st.sampled_from(list(REPEATS))),
        scale_first=st.booleans(),
        value_dim=st.sampled_from([DIM, VALUE_DIM]),
    ).filter(fits)
