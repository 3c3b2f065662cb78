"""What recognition refuses and why, masks of few dimensions, in-place changes, and masks inside whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from sparsepass.types import Band
from tests.masks.mask_graphs import check

LENGTH = 10


def grid(pad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(pad.shape[1])
    return i[:, None], i[None, :]


def causal(pad: torch.Tensor) -> torch.Tensor:
    q, k = grid(pad)
    return k <= q


def float_causal(pad: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(pad.shape[1], pad.shape[1]).masked_fill(~causal(pad), hidden)


def changed_before_reading(pad: torch.Tensor) -> torch.Tensor:
    pad = pad.clone()
    view = pad.bool()
    view[:, :3] = False
    return causal(pad) & view[:, None, None, :]


def changed_after_reading(pad: torch.Tensor) -> torch.Tensor:
    mask = causal(pad)
    shown = mask & pad.bool()[:, None, None, :]
    mask &= pad.bool()[:1]  # `shown` was computed before
    return shown & (mask.sum() >= 0)


def in_place_and(pad: torch.Tensor) -> torch.Tensor:
    mask = causal(pad)
    mask &= mask.t().clone()
    return mask


def through_a_view(pad: torch.Tensor) -> torch.Tensor:
    mask = causal(pad)
    mask.view(-1).fill_(True)
    return mask


REFUSED: list[tuple[Callable[[torch.Tensor], torch.Tensor], str]] = [
    (lambda pad: float_causal(pad, -1000.0), "-1000"),
    (lambda pad: float_causal(pad, float("nan")), "nan"),
    (lambda pad: torch.zeros(1, 1, LENGTH, LENGTH) + pad.float()[:, None, None, :], "bias with values of its own"),
    (lambda pad: (1.0 - pad.float()[:, None, None, :]) * torch.finfo(torch.float32).min, "bias with values of its own"),
    (lambda pad: causal(pad).int(), "integers"),
    (lambda pad: grid(pad)[1] < grid(pad)[0], "a strict bound"),
    (lambda pad: causal(pad) & (torch.arange(4)[:, None, None] > 0), "head"),
    (lambda pad: torch.zeros(LENGTH, LENGTH, dtype=torch.bool), "hides every key"),
    (lambda pad: causal(pad) | pad.bool()[:, None, None, :], "union"),
    (lambda pad: grid(pad)[1] <= grid(pad)[0] + pad[0, 0], "offset between queries and keys is data"),
    (lambda pad: pad[:, None, :, None] <= pad[:, None, None, :], "position ids that are data"),
    (in_place_and, "not understood"),
    (through_a_view, "in place"),
    (changed_before_reading, "in place"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_refused_with_its_reason(make: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    (site,) = check(make, (torch.ones(3, LENGTH, dtype=torch.int64),))
    assert reason in site.reason


def test_change_after_the_last_reading_is_harmless() -> None:
    (site,) = check(lambda pad: changed_after_reading(pad), (torch.randint(0, 2, (3, LENGTH)),))
    assert "sum" in site.reason or "ge" in site.reason  # the reason is the data, not the change


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks(rank: int) -> None:
    shape = (1,) * (rank - 2)
    (site,) = check(lambda pad: causal(pad).reshape(*shape, LENGTH, LENGTH), (torch.ones(3, LENGTH),))
    assert site.found.band == Band(right=0)


def test_several_padding_terms() -> None:
    def model(pad: torch.Tensor) -> torch.Tensor:
        return causal(pad) & pad.bool()[:, None, None, :] & (pad < 2)[:, None, None, :]

    (site,) = check(model, (torch.randint(0, 3, (3, LENGTH)),))
    assert len(site.found.padding) == 2


def test_mask_longer_than_the_keys_is_sliced() -> None:
    def model(pad: torch.Tensor) -> torch.Tensor:
        keys = pad.shape[1] - 3
        mask = (causal(pad) & pad.bool()[:, None, None, :]).expand(3, 1, -1, -1)
        return mask[:, :, :keys, :keys]

    (site,) = check(model, (torch.randint(0, 2, (3, LENGTH)),))
    assert site.found.band == Band(right=0)
    assert len(site.found.padding) == 1


def test_window_that_is_a_symbol_is_refused() -> None:
    def model(pad: torch.Tensor, window: int) -> torch.Tensor:
        q, k = grid(pad)
        return (k <= q) & (k > q - window)

    pad = torch.ones(3, LENGTH)
    (site,) = check(model, (pad, 4), (pad, 5), dynamic=True)
    assert "window that is a dynamic integer" in site.reason


def test_deep_graphs_are_refused_not_crashed() -> None:
    def model(pad: torch.Tensor) -> torch.Tensor:
        mask = causal(pad)
        for _ in range(400):
            mask = mask.unsqueeze(0).squeeze(0)
        return mask

    (site,) = check(model, (torch.ones(3, LENGTH),))
    assert "deep" in site.reason


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("name", "implementation", "dynamic", "band"),
    [
        ("Llama", "sdpa", False, Band(right=0)),
        ("Llama", "eager", True, Band(right=0)),
        ("Mistral", "sdpa", True, Band(left=15, right=0)),
        ("Gemma2", "eager", False, Band(left=15, right=0)),
        ("Bert", "sdpa", True, Band()),
        ("Bert", "eager", False, Band()),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_models(name: str, implementation: str, dynamic: bool, band: Band, padded: bool) -> None:
    extra = {} if name == "Bert" else {"num_key_value_heads": 1, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(
        **TINY, **extra, sliding_window=16, attn_implementation=implementation
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    ids = torch.randint(0, 64, (2, 40))
    pad = torch.ones_like(ids)
    pad[0, :7] = 0
    options = {} if name == "Bert" else {"use_cache": False}

    def forward(ids: torch.Tensor, pad: torch.Tensor | None) -> Any:
        return model(ids, attention_mask=pad, **options)

    sites = check(forward, (ids, pad if padded else None), dynamic=dynamic)
    if name == "Bert" and not padded:
        return  # bidirectional without padding needs no mask, or one that shows everything
    (site,) = sites
    assert site.found.band == band
    assert len(site.found.padding) == padded
    assert site.found.segments is None
