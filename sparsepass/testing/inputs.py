"""Attention inputs with the structure of trained models, on which a selection method can be right or wrong.

Random inputs attend to everything alike, so no choice of blocks is better than another. These have four parts, after
what is reported of trained models: a sink (arXiv 2309.17453), a pull toward near tokens, topics that recur along the
text, as in multi-head maps of MInference (arXiv 2407.02490), and some heads that attend to everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError

SINK_TOKENS = 4
NEAR = 256
"""Tokens back from a query that count as near."""

SPAN = (48, 1024)
"""Shortest and longest stretch of one topic, in tokens (log-uniform between; a text has at least eight stretches)."""

TOPIC_LOGIT, NOISE_LOGIT = 7.0, 1.0
"""Score of a key that states a query's topic fully, where none is given; standard deviation of what scores hold beside
any structure."""

ELSEWHERE = 0.2
"""Default share of queries that ask for a topic other than their own stretch's: a block's mean query hides them."""

FLAT = 0.15
"""A diffuse head's scores are this times those of the others."""

CONCENTRATED: dict[str, float] = {"local": 0.45, "diffuse": 1 / 32, "topic_logit": 11.0, "elsewhere": 0.1}
"""Arguments of ``structured_inputs`` for attention on fewer blocks: one head of 32 is diffuse, topics stand out, near
tokens hold more. FlashPrefill's rule (``Threshold(0.08)``) computes 12% at 32K tokens and 6% at 128K of them, with the
defaults 34% and 18%."""

_KEY_NOISE = 1.0 / TOPIC_LOGIT  # times the topic's part of a query: a standard deviation of 1
_KEY_GAIN = 2.5  # queries and keys get entries of about the same size, near 1
_SAMPLED_ROWS = 32


@dataclass(frozen=True)
class StructuredInputs:
    """Inputs of one attention call, and what they were made from.

    ``query`` [B, H, S, D], ``key`` and ``value`` [B, Hkv, S, D]: transposed views of [B, S, heads, D], as models pass
    them. ``scale`` is D^-0.5, the one the shares were fitted for. ``topics`` int64 [B, Hkv, S]: each token's topic.
    ``diffuse`` bool [H]: the heads that attend to everything.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    topics: Tensor
    diffuse: Tensor


def structured_inputs(
    *,
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    length: int,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    sink: float = 0.3,
    local: float = 0.25,
    topics: int = 24,
    diffuse: float = 0.125,
    topic_logit: float = TOPIC_LOGIT,
    elsewhere: float = ELSEWHERE,
) -> StructuredInputs:
    """Query, key and value of one causal self-attention over ``length`` tokens.

    ``sink`` and ``local``: mean share of a row's attention mass on the first 4 tokens and on the 256 nearest, averaged
    over heads that are not diffuse and over rows of the second half; every head has its own share around it. What is
    left goes to the query's topic, of ``topics``, which recur along the text in stretches of 48 to 1024 tokens.
    ``diffuse``: share of the query heads with nearly flat attention. ``topic_logit``: score of a key that states a
    query's topic fully. ``elsewhere``: share of queries that ask for another topic than their stretch's. Layout of the
    text and shares of the heads depend on ``seed`` alone, the noise on the device too. One head is made at a time.
    Raises ``KernelInputError``.
    """
    _check(heads, kv_heads, length, head_dim, sink, local, topics, diffuse, elsewhere)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    query = torch.empty(batch, length, heads, head_dim, dtype=dtype, device=device)
    key, value = (torch.empty(batch, length, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    flat = torch.zeros(heads, dtype=torch.bool)
    flat[torch.randperm(heads, generator=draw)[: round(diffuse * heads)]] = True
    shares = torch.rand(heads, 3, generator=draw) + 0.5  # of sink, near tokens and topics: half to one and a half
    rows = torch.linspace(length // 2, length - 1, min(_SAMPLED_ROWS, length)).long().to(device)
    layout = torch.stack([_stretches(length, topics, draw) for _ in range(batch * kv_heads)])
    layout = layout.view(batch, kv_heads, length).to(device)

    group, unit = heads // kv_heads, math.sqrt(math.sqrt(head_dim))
    for item in range(batch):
        for kv_head in range(kv_heads):
            text = _Text(layout[item, kv_head], topics, head_dim, draw, noise)
            key[item, :, kv_head] = text.key * (_KEY_GAIN * unit)
            value[item, :, kv_head] = text.values(noise)
            for head in range(kv_head * group, (kv_head + 1) * group):
                near, first = (float(shares[head, part]) * mean for part, mean in ((0, local), (1, sink)))
                made = text.query(
                    topic=topic_logit * (0.75 + 0.25 * float(shares[head, 2])),
                    near=min(near, 0.95 - min(first, 0.9)),
                    sink=min(first, 0.9),
                    flat=bool(flat[head]),
                    elsewhere=elsewhere,
                    rows=rows,
                    noise=noise,
                )
                query[item, :, head] = made * (unit / _KEY_GAIN)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return StructuredInputs(q, k, v, 1 / math.sqrt(head_dim), layout, flat.to(device))


class _Text:
    """Keys of one KV head in float32, as scores (a query times a key, unscaled), and queries made to fit them."""

    def __init__(
        self, topics: Tensor, count: int, head_dim: int, draw: torch.Generator, noise: torch.Generator
    ) -> None:
        self.topics, self.count, self.head_dim = topics, count, head_dim
        self.length, self.device = topics.shape[0], topics.device
        # A rotation, so that no coordinate means anything by itself. Its columns: sink, place, topic.
        basis: Tensor = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=draw))[0].to(self.device)
        places = head_dim // 8
        self.sink_direction = basis[:, 0]
        self.place = self._places(places, draw) @ basis[:, 1 : 1 + 2 * places].T
        room = head_dim - 1 - 2 * places
        meaning = torch.randn(count, room, generator=draw).to(self.device)
        self.meaning = torch.nn.functional.normalize(meaning, dim=-1) @ basis[:, 1 + 2 * places :].T
        self.value_of_topic = torch.randn(count, head_dim, generator=draw).to(self.device)

        # Most tokens only hint at their topic, few state it: a mean over a block sees the many.
        stated = torch.rand(self.length, 1, generator=noise, device=self.device)
        self.key = self.place + self.meaning[topics] * (0.25 + 0.95 * stated**8)
        self.key += self._noise(_KEY_NOISE, noise)
        self.key[:SINK_TOKENS] = self.sink_direction

    def _noise(self, size: float, noise: torch.Generator) -> Tensor:
        part = torch.randn(self.length, self.head_dim, generator=noise, device=self.device) * size
        # Nothing along the sink's direction, or its large factor in the queries would amplify it.
        return part - (part @ self.sink_direction)[:, None] * self.sink_direction

    def _places(self, count: int, draw: torch.Generator) -> Tensor:
        """Features [S, 2 count] of the positions; two of them multiply to a value that falls with log distance."""
        # Frequencies as rotary embeddings have them, from 1/4 to 1/4096 of a radian per token.
        exponent = (torch.arange(count) + torch.rand(count, generator=draw)) / count
        turns = (0.25 * (4.0 / 4096.0) ** exponent.double()).to(self.device)
        angle = torch.arange(self.length, dtype=torch.float64, device=self.device)[:, None] * turns
        return (torch.cat((angle.cos(), angle.sin()), dim=1) / math.sqrt(count)).float()

    def query(
        self,
        *,
        topic: float,
        near: float,
        sink: float,
        flat: bool,
        elsewhere: float,
        rows: Tensor,
        noise: torch.Generator,
    ) -> Tensor:
        """Queries [S, D] whose mass on near tokens and on the sink is fitted on the given ``rows``."""
        other = torch.randint(self.count, (self.length,), generator=noise, device=self.device)
        wander = torch.rand(self.length, generator=noise, device=self.device) < elsewhere
        content = self.meaning[torch.where(wander, other, self.topics)] * topic
        content += self._noise(NOISE_LOGIT / (_KEY_NOISE * math.sqrt(self.head_dim)), noise)
        if flat:
            return (content + self.place * 3.0) * FLAT

        tokens = torch.arange(self.length, device=self.device)
        seen = (tokens <= rows[:, None]) & (tokens >= SINK_TOKENS)
        close = seen & (tokens > rows[:, None] - NEAR)
        scores = (content[rows] @ self.key.T).masked_fill(~seen, -torch.inf)
        pull = self.place[rows] @ self.key.T
        low, high = torch.zeros((), device=self.device), torch.full((), 24.0, device=self.device)
        wanted = near / (1 - sink)
        for _ in range(12):
            middle = (low + high) / 2
            weights = (scores + middle * pull).softmax(-1)
            enough = torch.where(close, weights, 0.0).sum(-1).nanmean() > wanted
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        total = (scores + high * pull).logsumexp(-1)
        middle_row = (
            total[total.isfinite()].mean() if self.length > SINK_TOKENS else torch.zeros((), device=self.device)
        )
        first = middle_row + math.log(sink / (1 - sink) / SINK_TOKENS) if sink > 0 else torch.zeros_like(middle_row)
        return content + self.place * high + self.sink_direction * first

    def values(self, noise: torch.Generator) -> Tensor:
        """Values [S, D]: the topic's, and as much that is the token's own. The sink's are near zero, as in models."""
        own = torch.randn(self.length, self.head_dim, generator=noise, device=self.device)
        value = self.value_of_topic[self.topics] + own
        value[:SINK_TOKENS] *= 0.05
        return value


def _stretches(length: int, topics: int, draw: torch.Generator) -> Tensor:
    """The topic of each token [length]: stretches of one topic, some topics more frequent than others."""
    shortest, longest = min(SPAN[0], max(1, length // 64)), min(SPAN[1], max(2, length // 8))
    count = -(-length // shortest)
    spans = torch.exp(torch.rand(count, generator=draw) * math.log(longest / shortest)) * shortest
    frequency = 1.0 / (torch.arange(topics) + 3.0)
    order = torch.multinomial(frequency[torch.randperm(topics, generator=draw)], count, True, generator=draw)
    return order.repeat_interleave(spans.long().clamp(min=1))[:length]


def _check(
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    sink: float,
    local: float,
    topics: int,
    diffuse: float,
    elsewhere: float,
) -> None:
    if kv_heads < 1 or heads < kv_heads or heads % kv_heads:
        raise KernelInputError(f"heads is {heads} and kv_heads {kv_heads}; heads must be a multiple of kv_heads.")
    if length < 1 or head_dim < 16 or topics < 1:
        raise KernelInputError(
            f"length is {length}, head_dim {head_dim} and topics {topics}; accepted are at least 1, 16 and 1."
        )
    if not (sink >= 0 and local >= 0 and sink + local < 1 and 0 <= diffuse <= 1 and 0 <= elsewhere <= 1):
        raise KernelInputError(
            f"sink is {sink}, local {local}, diffuse {diffuse} and elsewhere {elsewhere}; accepted are shares of which "
            "the first two sum to less than 1."
        )
