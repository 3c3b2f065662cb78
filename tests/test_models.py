"""Real architectures, random weights: density 1.0 through the sparse kernel with full lists equals the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sparsepass
from sparsepass.rewriting import counters
from tests.tiny import SPARSE_OPTIONS, everything_sparse, model, tokens

LENGTH = 300
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 200},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def full_lists(batch: int, layers: int = 2, heads: int = 4, block: int = 64) -> int:
    rows = -(-LENGTH // block)
    return batch * layers * heads * rows * (rows + 1) // 2


def compiled(fn: Any, **changes: Any) -> Any:
    options = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(1.0, block=64), **changes}
    return torch.compile(fn, backend=sparsepass.backend, options=options)


def request_of(batch: int, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, and which rows are real: a left-padded batch of different lengths, or one full row."""
    ids = tokens(batch, LENGTH).to(device)
    real = torch.ones(batch, LENGTH, dtype=torch.bool, device=device)
    if batch == 1:
        return {"input_ids": ids}, real
    for row in range(batch):
        real[row, : 37 * row] = False
    return {"input_ids": ids, "attention_mask": real.long()}, real


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_equal_dense_at_density_one(arch: str, attn: str, batch: int, device: str, fresh_dynamo: None) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    built = model(arch, attn, **ARCHITECTURES[arch])
    inputs, real = request_of(batch, device)
    # The exact result comes from SDPA: eager in float64 overflows its own mask and yields NaN on left padding.
    with torch.no_grad():
        exact = (
            copy.deepcopy(model(arch, "sdpa", **ARCHITECTURES[arch]))
            .to(device, torch.float64)(**inputs, use_cache=False)
            .logits[real]
        )
        own = copy.deepcopy(built).to(device, dtype)
        dense = own(**inputs, use_cache=False).logits[real].double()
        before = counters.total()
        with sparsepass.task("multi_hop"):
            sparse = compiled(own)(**inputs, use_cache=False).logits[real].double()
        ran = counters.total() - before
    assert ran.launches == 2, "both layers go through the sparse kernel"
    if batch == 1 and arch != "mistral":
        assert ran.computed == full_lists(batch), "with full lists"
    assert ran.computed == ran.visible
    assert torch.linalg.vector_norm(sparse - exact) <= 2 * torch.linalg.vector_norm(dense - exact)
    assert (sparse - exact).abs().max() <= 2 * (dense - exact).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_dense(arch: str, batch: int, device: str, fresh_dynamo: None) -> None:
    built = copy.deepcopy(model(arch, "sdpa", **ARCHITECTURES[arch])).to(device)
    inputs, _ = request_of(batch, device)
    wanted = built.generate(**inputs, max_new_tokens=64, do_sample=False)
    before = counters.total()
    built.forward = compiled(built.forward)
    with sparsepass.task("single_qa"):
        tokens_out = built.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert (counters.total() - before).launches == 2, "the prefill is sparse, decode stays dense"
    assert torch.equal(tokens_out, wanted)


def test_decode_graphs_carry_no_hint_guard(fresh_dynamo: None) -> None:
    built = copy.deepcopy(model("llama", "sdpa"))
    built.forward = compiled(built.forward)
    report = sparsepass.explain(built.generate, tokens(1, LENGTH), max_new_tokens=4, do_sample=False, task="single_qa")
    decode = [graph for graph in report.graphs if graph.decode_sites]
    assert decode
    assert all(graph.guards == () for graph in decode)
    assert sum(graph.decode_sites == 0 for graph in report.graphs) == 1


def test_generate_of_a_compiled_module_compiles_nothing(fresh_dynamo: None) -> None:
    built: Any = torch.compile(copy.deepcopy(model("llama", "sdpa")), backend=sparsepass.backend)
    report = sparsepass.explain(built.generate, tokens(1, 20), max_new_tokens=2, do_sample=False)
    assert not report.compiled
    assert "Nothing was compiled" in str(report)


def test_gradients_keep_a_site_dense(fresh_dynamo: None) -> None:
    built = copy.deepcopy(model("llama", "sdpa"))
    out = compiled(built)(tokens(1, 200), use_cache=False).logits
    before = counters.total()
    out.sum().backward()
    assert (counters.total() - before).launches == 0
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_attention_probabilities_that_are_returned_keep_the_site_dense(fresh_dynamo: None) -> None:
    built = copy.deepcopy(model("llama", "eager"))
    options = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(0.5)}
    report = sparsepass.explain(
        built, tokens(1, 200), use_cache=False, output_attentions=True, task="single_qa", options=options
    )
    reasons = [skip.reason for graph in report.graphs for skip in graph.refused]
    assert len(reasons) == 2
    assert all("inside the attention" in reason for reason in reasons)


def test_autocast_runs_in_the_lower_type(fresh_dynamo: None) -> None:
    built = copy.deepcopy(model("llama", "sdpa"))
    ids = tokens(1, LENGTH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = built(ids, use_cache=False).logits
        before = counters.total()
        got = compiled(built)(ids, use_cache=False).logits
    assert (counters.total() - before).launches == 2
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got.float(), wanted.float(), atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_two_devices_in_one_process(fresh_dynamo: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first = torch.randn(1, 4, LENGTH, 64, device="cuda:0", dtype=torch.bfloat16)

    def two(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).to("cuda:1")
        return torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)

    before = counters.total()
    with torch.no_grad():
        out = compiled(two)(first)
    assert (counters.total() - before).launches == 2
    torch.testing.assert_close(out, two(first), atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_graphs(fresh_dynamo: None) -> None:
    """``mode="reduce-overhead"``: the graph is captured and replayed, and replays are counted by the kernels."""
    built = copy.deepcopy(model("llama", "sdpa", head_dim=64)).to("cuda", torch.bfloat16)
    policy = everything_sparse(0.5)
    options: dict[str, Any] = {"sparsepass.always_sparse": True, "sparsepass.policy": policy, "triton.cudagraphs": True}
    fn: Any = torch.compile(built, backend=sparsepass.backend, options=options)
    with torch.no_grad():
        for seed in range(5):
            ids = tokens(1, 1024, seed).to("cuda")
            before = counters.total()
            torch.compiler.cudagraph_mark_step_begin()
            got = fn(ids, use_cache=False).logits.clone()
            assert (counters.total() - before).launches == 2
        torch._dynamo.reset()
        plain: Any = torch.compile(built, backend=sparsepass.backend, options={**options, "triton.cudagraphs": False})
        torch.testing.assert_close(got, plain(ids, use_cache=False).logits)
