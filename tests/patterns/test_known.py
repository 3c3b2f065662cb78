"""Attention that is known by name and stays as it is, and softmaxes written out, in small models and in real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparsepass.measure.coverage.reasons import general
from sparsepass.sites import Findings, find_sites

T = torch.Tensor
B, H, S, D, W = 1, 2, 192, 8, 32


def findings(function: Callable[..., Any], *given: Any, **named: Any) -> list[Findings]:
    """What is found in each captured graph; nothing is rewritten or run by Inductor."""
    found: list[Findings] = []

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(find_sites(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=look, dynamic=False)(*given, **named)
    return found


def reasons(found: list[Findings]) -> list[str]:
    return [str(skip.reason) for one in found for skip in one.refused]


def sites(found: list[Findings]) -> int:
    return sum(len(one.sites) for one in found)


def qkv() -> tuple[T, T, T]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def windows(x: T) -> T:
    """[B, H, chunks, 2 W, D], each chunk half of the next."""
    return x.unfold(2, 2 * W, W).transpose(-1, -2)


def chunks(x: T) -> T:
    return x.view(B, H, -1, W, D)


def with_previous(x: T) -> T:
    """[B, H, chunks, 2 W, D]: a chunk's own tokens behind those of the chunk before."""
    return torch.cat([torch.cat([x[:, :, -1:], x[:, :, :-1]], dim=2), x], dim=3)


def banded(q: T, k: T, v: T) -> T:
    """Longformer's: products of overlapping chunks, diagonals cut out of them into a band [.., W, 2 W]."""
    product = torch.einsum("bhcxd,bhcyd->bhcxy", windows(q), windows(k))
    band = product.new_zeros(B, H, S // W, W, 2 * W)
    band[:, :, :-1, :, W:] = product[:, :, :, :W, W:]
    band[:, :, 1:, :, :W] = product[:, :, :, W:, :W]
    p = F.softmax(band, dim=-1)
    return torch.matmul(p, windows(F.pad(v, (0, 0, W, 0))))


def local_and_global(q: T, k: T, v: T) -> T:
    """Pegasus-X's: a block's own keys and the first 16 of all."""
    own = torch.einsum("BHNKF,BHNXF->BHNKX", chunks(q), chunks(k))
    first = torch.einsum("BHNKF,BHGF->BHNKG", chunks(q), k[:, :, :16])
    p = F.softmax(torch.cat([first, own], dim=-1), dim=-1)
    return p[..., :16] @ v[:, :, None, :16] + p[..., 16:] @ chunks(v)


def bucketed(q: T, k: T, v: T) -> T:
    """Reformer's LSH: tokens in the order of their buckets; the log-sum-exp is used besides."""
    order = q[..., 0].round().argsort(dim=-1)[..., None].expand(-1, -1, -1, D)
    q, v = chunks(q.gather(2, order)), chunks(v.gather(2, order))
    scores = q @ with_previous(q).mT
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return (scores - lse).exp() @ with_previous(v) * lse.sigmoid()


def neighbors(q: T, k: T, v: T, fill: T) -> T:
    """Reformer's local attention: its hidden scores are filled by a buffer."""
    scores = chunks(q) @ with_previous(chunks(k)).mT
    scores = torch.where(scores.new_ones(W, 2 * W).tril(W).bool(), scores, fill)
    return F.softmax(scores, dim=-1) @ with_previous(chunks(v))


def pieces(q: T, k: T, v: T) -> T:
    scores = q.new_empty(B, H, S, S)
    scores[:, :, : S // 2] = q[:, :, : S // 2] @ k.mT
    scores[:, :, S // 2 :] = q[:, :, S // 2 :] @ k.mT
    return F.softmax(scores, dim=-1) @ v


KNOWN = {
    banded: "attention over chunks with overlapping windows, as Longformer writes it",
    local_and_global: "attention to several sets of keys, as Pegasus-X and BigBird write it",
    bucketed: "attention within buckets of sorted tokens (LSH), as Reformer writes it: 'lse', inside the attention, "
    "is also used by",
    pieces: "scores put together in 'scores' from pieces that are written into it",
}


@pytest.mark.parametrize("written", KNOWN, ids=lambda written: written.__name__)
def test_known_spellings_are_named(written: Callable[..., T]) -> None:
    found = findings(written, *qkv())
    assert sites(found) == 0
    (reason,) = reasons(found)
    assert KNOWN[written] in reason


def test_a_fill_of_unknown_value_is_named() -> None:
    found = findings(neighbors, *qkv(), torch.tensor(-1e9))
    (reason,) = reasons(found)
    assert reason.startswith("attention of chunks to themselves and their neighbors, as Reformer writes it")
    assert "in the place of scores, a tensor whose value is not known when the graph is compiled" in reason

    def plain(q: T, k: T, v: T, fill: T) -> T:
        return F.softmax((q @ k.mT).masked_fill((q @ k.mT) > 3, fill), dim=-1) @ v

    (reason,) = reasons(findings(plain, *qkv(), torch.tensor(-1e9)))
    assert "tensor whose value is not known" in reason
    assert "Reformer" not in reason


def test_chunks_alone_are_attention() -> None:
    """What has a name only by its layout matches where the reader follows the rest."""

    def own_chunk(q: T, k: T, v: T) -> T:
        return F.softmax(chunks(q) @ chunks(k).mT, dim=-1) @ chunks(v)

    def previous_too(q: T, k: T, v: T) -> T:
        scores = (chunks(q) @ with_previous(chunks(k)).mT).masked_fill(~torch.ones(W, 2 * W).tril(W).bool(), -1e9)
        return F.softmax(scores, dim=-1) @ with_previous(chunks(v))

    def overlapping(q: T, k: T, v: T) -> T:
        return F.softmax(windows(q) @ windows(k).mT, dim=-1) @ windows(v)

    for written in (own_chunk, previous_too, overlapping):
        found = findings(written, *qkv())
        assert (sites(found), reasons(found)) == (1, []), written


def test_what_has_no_effect_says_so() -> None:
    def unused(q: T, k: T, v: T) -> T:
        F.softmax(q @ k.mT, dim=-1) @ v
        return q + 1

    (reason,) = reasons(findings(unused, *qkv()))
    assert "has no effect, and the compiler leaves it out" in reason


def test_softmaxes_over_other_things_are_not_named() -> None:
    """A name needs a product of two activations above the softmax."""

    def router(q: T, k: T, v: T) -> T:
        weights = torch.randn(D, 64, generator=torch.Generator().manual_seed(0))
        logits = q.new_zeros(B, H, S, 64)
        logits[:, :, : S // 2] = (q @ weights)[:, :, : S // 2]
        return F.softmax(logits, dim=-1) * 2

    def of_an_earlier_layer(q: T, k: T, v: T) -> T:
        """A gate over a window of tokens; the products are those of rotary angles, behind a norm."""
        angles = torch.matmul(torch.ones(1, D // 2, 1), torch.arange(S).float()[None, None, :]).mT
        x = F.layer_norm(q * torch.cat([angles, angles], dim=-1)[:, None].cos(), (D,))
        logits = x.new_zeros(B, H, S, D)
        logits[..., : S // 2, :] = x[..., : S // 2, :]
        return F.softmax(logits.unflatten(2, (-1, 16)), dim=3).flatten(2, 3) + F.softmax(x.mT, dim=-1).mT

    for written in (router, of_an_earlier_layer):
        found = findings(written, *qkv())
        assert (sites(found), reasons(found)) == (0, []), written


def test_weights_that_are_no_softmax_are_none() -> None:
    """Written with a sum, as a softmax is, but of something else."""

    def of_half(q: T, k: T, v: T) -> T:
        scores = q @ k.mT
        return torch.exp(scores - torch.logsumexp(scores * 0.5, dim=-1, keepdim=True)) @ v

    def of_squares(q: T, k: T, v: T) -> T:
        weights = torch.exp(q @ k.mT)
        return weights / weights.square().sum(-1, keepdim=True) @ v

    def of_everything(q: T, k: T, v: T) -> T:
        weights = torch.exp(q @ k.mT)
        return weights / weights.sum((-2, -1), keepdim=True) @ v

    def turned(q: T, k: T, v: T) -> T:
        weights = torch.exp(q @ k.mT)
        return weights.sum(-1, keepdim=True) / weights @ v

    for written in (of_half, of_squares, of_everything, turned):
        assert sites(findings(written, *qkv())) == 0, written


MODELS = {
    ("longformer", "encoder"): ["attention over chunks with overlapping windows"],
    ("pegasus_x", "encoder_decoder"): ["has no effect", "attention to several sets of keys"],
    ("reformer", "decoder"): ["attention of chunks to themselves and their neighbors"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind"), MODELS)
def test_models_that_write_them(arch: str, kind: str) -> None:
    from sparsepass.measure.coverage.architectures import Kind
    from sparsepass.measure.coverage.inputs import Phase, call_for
    from sparsepass.measure.coverage.tiny import build

    model = build(arch, Kind(kind), "eager")
    args, named = call_for(model, Kind(kind), Phase.PREFILL, 200).arguments()
    found = [general(reason) for reason in reasons(findings(model, *args, **named))]
    wanted = MODELS[arch, kind]
    assert len(found) == len(wanted), found
    assert all(text in reason for text, reason in zip(wanted, found, strict=True)), found


@pytest.mark.slow
def test_reformers_buckets() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 32}
    config = transformers.ReformerConfig(
        attn_layers=["lsh"], axial_pos_embds=False, num_buckets=4, vocab_size=64, is_decoder=True, **sizes
    )
    model = transformers.ReformerModelWithLMHead(config).eval()
    (reason,) = reasons(findings(model, torch.randint(4, 60, (1, 128)), use_cache=False))
    assert reason.startswith("attention within buckets of sorted tokens (LSH), as Reformer writes it: ")
