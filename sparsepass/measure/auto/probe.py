"""Signs of a prefill that it fell short: from its last logits, and from a few rows run again, all keys visible.

A cheap prefill leaves a cache. The probe reads three things of it, none of which knows what was asked:

- the last logits: how uncertain the first token is;
- the last token once more, as a decode step: where its attention lies, and how sparse the last hidden state is;
- a **recheck**: the tokens that the last one attends to most, and those that these attend to most, are run again,
  seeing everything before them, and the last one after them. Each row costs a row of dense attention. If the cheap
  pass had left out what those tokens needed, the answer's distribution moves; if it had not, it stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sparsepass.errors import shown
from sparsepass.measure.auto.attention import Attention
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.models import branch

SPREAD_BLOCK = 64
"""Tokens per block that the attention's spread is taken over."""

TINY = 1e-12
"""Length that a vector of zeros is given."""


SIGNALS = ("entropy", "margin", "spread", "activation", "shift")
"""What a probe tells of a request; larger is meant to be worse."""


@dataclass(frozen=True)
class Probe:
    """How many rows a recheck runs again, 0: none. A fifth are those that the last token attends to most, the rest what
    any of these attends to most: one that is wrong may be so for want of another that is."""

    rows: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 0:
            raise AutoError(f"A probe's rows are {shown(self.rows)}; accepted is a whole number of 0 or more.")

    @property
    def rounds(self) -> tuple[int, ...]:
        """Rows chosen after each look at what attends to what."""
        first = -(-self.rows // 5)
        return (first, self.rows) if first < self.rows else (self.rows,) * (self.rows > 0)

    def cost(self, length: int) -> float:
        """Share of a dense causal prefill's attention: each row looks at every key as often as it runs."""
        ran = 1 + sum(chosen + 1 for chosen in self.rounds)
        return min(1.0, 2 * ran / (length + 1))


def logit_signals(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the last position's logits [B, V], float32 [B] each: ``entropy`` in nats and ``margin`` between the two most
    likely tokens, both as logarithms, the margin negated: larger is more uncertain."""
    logs = logits.float().log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    best = logs.topk(2, dim=-1).values
    margin = best[:, 0] - best[:, 1]
    return {"entropy": entropy.clamp_min(1e-9).log(), "margin": -margin.clamp_min(1e-3).log()}


def probe(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    logits: torch.Tensor,
    settings: Probe,
    attention_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """All signals of a prefill of ids [B, S], by name, float32 [B]; larger is meant to be worse.

    ``cache`` holds all S tokens and is left as it is; ``logits`` [B, V] are those of the last. ``attention_mask``
    [B, S]: 0 where ``ids`` is padding, on the left. Runs ``model`` eagerly: three short calls at most, and none waits
    for the device. Raises ``AutoError`` where the model's attention cannot be seen.
    """
    found = logit_signals(logits)
    length = ids.shape[1]
    device = ids.device
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    first = length - real.sum(-1, keepdim=True)  # [B, 1]: the first real token

    last = torch.full((len(ids), 1), length - 1, device=device)
    seen = _Seen(length)
    hidden = _rerun(model, ids, cache, last, real, first, seen, hidden=True)[1]
    found["spread"] = seen.spread()
    found["activation"] = hoyer(hidden[:, -1].float())
    if not settings.rows:
        return found

    again = last
    for count in settings.rounds:
        if again is not last:
            seen = _Seen(length)
            _rerun(model, ids, cache, again, real, first, seen)
        importance = seen.importance()
        importance.scatter_(1, first, 0.0)  # where attention goes that has nowhere else to go
        importance.scatter_(1, again, -1.0)  # they run again anyway
        chosen = importance.topk(min(count + 1, length) - again.shape[1], dim=-1).indices
        again = torch.cat([again, chosen], -1).sort(-1).values
    logs, _ = _rerun(model, ids, cache, again, real, first, None)
    return found | {"shift": shift(logits.float().log_softmax(-1), logs)}


def shift(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far the answer's distribution moved, [B] from log-probabilities [B, V] to others: the larger of both
    Kullback-Leibler divergences, in nats, as a logarithm."""
    one = (before.exp() * (before - after)).sum(-1)
    other = (after.exp() * (after - before)).sum(-1)
    return torch.maximum(one, other).clamp_min(1e-9).log()


class _Seen:
    """What the queries of one call attend to, from each layer's weights [B, H, R, S]; none is kept."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers = 0
        self.best: torch.Tensor | None = None
        """[B, S]: the largest weight of any layer and head so far."""
        self._spread: torch.Tensor | None = None

    def __call__(self, weights: torch.Tensor) -> None:
        self.layers += 1
        most = weights.amax((1, 2))
        self.best = most if self.best is None else torch.maximum(self.best, most)
        blocks = -(-self.length // SPREAD_BLOCK)
        part = torch.constant_pad_nd(weights[:, :, -1], (0, blocks * SPREAD_BLOCK - self.length))
        mass = part.unflatten(-1, (blocks, SPREAD_BLOCK)).sum(-1)
        spread = torch.special.entr(mass).sum(-1).mean(-1)
        self._spread = spread if self._spread is None else self._spread + spread

    def importance(self) -> torch.Tensor:
        """[B, S]: the largest weight that any query gives a key."""
        assert self.best is not None  # attention was seen, or the call had raised
        return self.best

    def spread(self) -> torch.Tensor:
        """[B]: entropy of the last query's attention over blocks, over that of the even spread, mean over heads."""
        assert self._spread is not None  # as above
        blocks = -(-self.length // SPREAD_BLOCK)
        return self._spread / self.layers / math.log(max(blocks, 2))


def _rerun(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    rows: torch.Tensor,
    real: torch.Tensor,
    first: torch.Tensor,
    seen: _Seen | None,
    *,
    hidden: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens at rows [B, R] once more, each seeing all before it: of the cache, but of ``rows`` as they are now.

    Gives the log-probabilities [B, V] after the last one, and with ``hidden`` the last hidden states [B, R, hidden].
    """
    length = ids.shape[1]
    keys = torch.arange(length, device=ids.device)
    old = (keys <= rows[..., None]) & real[:, None]  # [B, R, S]
    old &= ~torch.zeros_like(real).scatter_(1, rows, True)[:, None]
    new = (rows[:, None, :] <= rows[..., None]) & real.gather(1, rows)[:, None]
    new |= torch.eye(rows.shape[1], dtype=torch.bool, device=ids.device)  # a padded row has to see something
    mask = torch.cat([old, new], -1)[:, None]
    arguments = {
        "input_ids": ids.gather(1, rows),
        "position_ids": (rows - first).clamp_min(0),
        "attention_mask": mask,
        "past_key_values": branch(cache),
        "use_cache": True,
        "logits_to_keep": 1,
        "output_hidden_states": hidden,
    }
    forward = type(model).forward
    if seen is None:
        out = forward(model, **arguments)
    else:
        with Attention(lambda weights: seen(_together(weights, rows, length))) as watched:
            out = forward(model, **arguments)
        if not watched.calls:
            raise AutoError(
                'task("auto") cannot see the attention of this model: it does not call '
                "scaled_dot_product_attention. Load it with attn_implementation='sdpa'."
            )
    logs = out.logits[:, -1].float().log_softmax(-1)
    return logs, out.hidden_states[-1] if hidden else logs


def _together(weights: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Weights on the keys run again [B, H, R, S + R], put where those keys stand: [B, H, R, S]."""
    held, added = weights[..., :length], weights[..., length:]
    return held.scatter_add(-1, rows[:, None, None].expand_as(added), added)


def hoyer(values: torch.Tensor) -> torch.Tensor:
    """Hoyer's sparsity [B] of values [B, N] (arXiv cs/0408058): 0 all alike, 1 a single one."""
    root = math.sqrt(values.shape[-1])
    length: torch.Tensor = values.square().sum(-1).sqrt().clamp_min(TINY)
    return (root - values.abs().sum(-1) / length) / (root - 1)
