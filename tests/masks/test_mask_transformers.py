"""Every kind of mask that transformers makes, at sizes around every constant, against the full mask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

from sparsepass.types import Align, Band
from tests.masks.mask_graphs import Site, check

WINDOW = 16
SIZES = (WINDOW - 1, WINDOW, WINDOW + 1, 2, 40)
CAUSAL, FULL = Band(right=0), Band()
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


class Maker(torch.nn.Module):
    """Makes a mask as a model does: the configuration belongs to the module."""

    def __init__(self, kind: str, implementation: str, window: int = WINDOW) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8)
        self.config.sliding_window = self.config.attention_chunk_size = window
        self.config._attn_implementation = implementation
        self.create: Callable[..., Any] = getattr(masking_utils, f"create_{kind}_mask")
        self.bidirectional = "bidirectional" in kind

    def forward(
        self,
        embeds: torch.Tensor,
        padding: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        if self.bidirectional:
            return self.create(self.config, embeds, attention_mask=padding)
        return self.create(self.config, embeds, attention_mask=padding, position_ids=positions, past_key_values=cache)


def embeds(length: int, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, length, 8)


def padding(length: int, batch: int = 2, *, left: bool = True, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=dtype)
    mask[0, : length // 3] = 0
    mask[1, : 1 if left else 0] = 0
    return mask if left else mask.flip(-1).contiguous()


def packed(length: int, batch: int = 2) -> torch.Tensor:
    """Position ids of several documents a row, cut at other places in each row."""
    rows = []
    for row in range(batch):
        cuts = sorted({0, length // (3 + row), length // 2 + row, length})
        rows.append(torch.cat([torch.arange(end - start) for start, end in pairwise(cuts)]))
    return torch.stack(rows)


def band_of(kind: str, length: int, dynamic: bool) -> Band:
    """The band expected of this kind, where a window that reaches over everything is none if the length is known."""
    if kind in ("causal", "sliding_window_causal"):
        window = "window" in kind and (dynamic or length > WINDOW)
        return Band(left=WINDOW - 1, right=0) if window else CAUSAL
    if kind == "bidirectional_sliding_window" and (dynamic or length > WINDOW + 1):
        return Band(left=WINDOW, right=WINDOW)
    return FULL


def only(sites: list[Site], calls: int = 1) -> Site:
    assert len(sites) == 1
    if not hasattr(sites[0].terms, "reason"):
        assert sites[0].calls == calls
    return sites[0]


KINDS = ["causal", "sliding_window_causal", "bidirectional", "bidirectional_sliding_window"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("implementation", "left"), [("sdpa", True), ("eager", False)])
def test_padded(kind: str, implementation: str, left: bool) -> None:
    for length in SIZES:
        site = only(check(Maker(kind, implementation), (embeds(length), padding(length, left=left))))
        assert site.found.band == band_of(kind, length, dynamic=False)
        assert len(site.found.padding) == 1
        assert site.found.padding[0].meta["example_value"].shape == (2, length)
        assert site.found.segments is None


@pytest.mark.parametrize("kind", KINDS)
@IMPLEMENTATIONS
def test_padded_dynamic(kind: str, implementation: str) -> None:
    calls = [(embeds(length), padding(length)) for length in (40, *SIZES[:3], 99)]
    site = only(check(Maker(kind, implementation), *calls, dynamic=True), calls=len(calls))
    assert site.found.band == band_of(kind, 99, dynamic=True)
    assert site.found.summary.padding
    assert not site.found.summary.packed


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal"])
@IMPLEMENTATIONS
def test_packed_by_position_ids(kind: str, implementation: str) -> None:
    for length in SIZES[:3]:
        site = only(check(Maker(kind, implementation), (embeds(length), None, packed(length))))
        assert site.found.band == band_of(kind, length, dynamic=False)
        assert site.found.segments is not None
        assert not site.found.padding


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal"])
@IMPLEMENTATIONS
def test_packed_by_position_ids_dynamic(kind: str, implementation: str) -> None:
    """Positions that are no documents at all are still masked as the graph says."""
    strange = torch.randint(0, 4, (2, 50))
    calls: list[tuple[Any, ...]] = [(embeds(n), None, packed(n)) for n in (40, 15, 16, 17, 99)]
    calls += [(embeds(50), None, strange), (embeds(50), None, strange.sort(-1).values)]
    site = only(check(Maker(kind, implementation), *calls, dynamic=True), calls=len(calls))
    assert site.found.band == band_of(kind, 99, dynamic=True)
    assert site.found.segments is not None


@IMPLEMENTATIONS
@DYNAMIC
def test_one_row_of_position_ids_for_the_batch(implementation: str, dynamic: bool) -> None:
    site = only(check(Maker("causal", implementation), (embeds(40), None, packed(40)[:1]), dynamic=dynamic))
    assert site.found.band == CAUSAL
    assert site.found.segments is not None


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal"])
@DYNAMIC
def test_positions_counted_in_the_graph(kind: str, dynamic: bool) -> None:
    """Without position ids a model counts them itself; the search for documents in those finds none."""

    class Model(Maker):
        def forward(self, embeds: torch.Tensor) -> Any:  # type: ignore[override]
            positions = torch.arange(embeds.shape[1], device=embeds.device) + 0
            return super().forward(embeds, None, positions.unsqueeze(0))

    site = only(check(Model(kind, "eager"), (embeds(40),), dynamic=dynamic))
    assert site.found.band == band_of(kind, 40, dynamic)
    assert site.found.segments is None


@pytest.mark.parametrize("length", [199, 200, 201, 300])
def test_window_beyond_any_sample(length: int) -> None:
    """A sample smaller than the window sees a causal mask (this is how a sampling prototype was wrong)."""
    site = only(check(Maker("sliding_window_causal", "eager", window=200), (embeds(length), padding(length))))
    assert site.found.band == (Band(left=199, right=0) if length > 200 else CAUSAL)


def test_window_dynamic_crosses_the_window() -> None:
    calls = [(embeds(n), padding(n)) for n in (300, 40, 199, 200, 201, 257)]
    site = only(check(Maker("sliding_window_causal", "sdpa", window=200), *calls, dynamic=True), calls=len(calls))
    assert site.found.band == Band(left=199, right=0)


@DYNAMIC
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_is_refused(dynamic: bool, padded: bool) -> None:
    maker = Maker("chunked_causal", "eager" if padded else "sdpa")
    site = only(check(maker, (embeds(40), padding(40) if padded else None), dynamic=dynamic))
    assert "chunked attention" in site.reason


def filled(cache: Any, length: int, batch: int = 2) -> Any:
    """``cache`` after ``length`` tokens."""
    cache.update(torch.zeros(batch, 2, length, 4), torch.zeros(batch, 2, length, 4), 0)
    return cache


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal"])
@pytest.mark.parametrize(("past", "padded"), [(1, False), (5, True), (30, False), (30, True)])
@DYNAMIC
def test_chunked_prefill(kind: str, past: int, padded: bool, dynamic: bool) -> None:
    length = WINDOW
    mask = padding(past + length) if padded else None
    maker = Maker(kind, "eager")
    site = only(check(maker, (embeds(length), mask, None, filled(DynamicCache(), past)), dynamic=dynamic))
    assert site.found.band.right == 0
    assert site.found.band.align is Align.BOTTOM_RIGHT
    assert len(site.found.padding) == padded


@pytest.mark.parametrize(("past", "dynamic"), [(5, False), (WINDOW - 1, False), (WINDOW, False), (5, True), (30, True)])
def test_sliding_cache(past: int, dynamic: bool) -> None:
    """A cache that dropped old keys starts its keys at an offset."""
    maker = Maker("sliding_window_causal", "eager")
    cache = filled(DynamicCache(config=maker.config), past)
    site = only(check(maker, (embeds(40), None, None, cache), dynamic=dynamic))
    assert site.found.band == Band(left=WINDOW - 1, right=0, align=Align.BOTTOM_RIGHT)


@DYNAMIC
def test_prefill_with_empty_cache(dynamic: bool) -> None:
    site = only(check(Maker("causal", "eager"), (embeds(40), padding(40), None, DynamicCache()), dynamic=dynamic))
    assert site.found.band == CAUSAL


@pytest.mark.parametrize("padded", [False, True])
def test_decode(padded: bool) -> None:
    """One query sees every key: no band is left."""
    cache = filled(DynamicCache(), 30)
    site = only(check(Maker("causal", "eager"), (embeds(1), padding(31) if padded else None, None, cache)))
    assert site.found.band == FULL
    assert len(site.found.padding) == padded


def without_window(maker: Maker) -> Maker:
    """Caches make sliding layers of a configuration that has a window."""
    maker.config.sliding_window = maker.config.attention_chunk_size = None
    return maker


def test_static_cache() -> None:
    """Prefill into a fresh static cache is a mask over all its slots; later the offset is data."""
    maker = without_window(Maker("causal", "eager"))
    site = only(check(maker, (embeds(8), None, None, StaticCache(config=maker.config, max_cache_len=24))))
    assert site.found.band == CAUSAL
    site = only(check(maker, (embeds(8), None, None, filled(StaticCache(maker.config, max_cache_len=24), 5))))
    assert "offset" in site.reason
    assert "data" in site.reason


def test_static_cache_decode() -> None:
    """With one query the written slots are a term on the keys alone, which a node of the graph holds."""
    maker = without_window(Maker("causal", "sdpa"))
    site = only(check(maker, (embeds(1), None, None, filled(StaticCache(maker.config, max_cache_len=24), 5))))
    assert site.found.band == FULL
    assert len(site.found.padding) == 1


def test_custom_mask_functions_are_refused() -> None:
    maker = Maker("causal", "sdpa")

    def model(embeds: torch.Tensor) -> Any:
        return maker.create(
            maker.config,
            embeds,
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda b, h, q, k: q == 3,
        )

    assert "not understood" in only(check(model, (embeds(8),))).reason
