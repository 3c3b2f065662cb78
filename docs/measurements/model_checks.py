"""Small models in bf16 through the sparse kernels, against the same models in float64. Prints tables, writes JSON.

    python docs/measurements/model_checks.py --out docs/measurements/model_checks_h200.json

At density 1, with full lists through the block-sparse op, the logits' error must be at most twice that of the model in
bf16 uncompiled; both have the same weights as the float64 model, rounded to bf16 before. At density 0.5 the op must
compute fewer blocks than the mask has and give finite logits; how far they are from the dense ones is listed, and says
little on random weights. Experts are all chosen, or left out: a route that flips by rounding would be most of the
error. Sites are counted in the uncompiled run; what is not rewritten is listed with its reason. The exit status is 1
if a check fails, or nothing of a model was rewritten.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import sparsepass
from sparsepass.measure.coverage.count import AttentionCounter
from sparsepass.measure.coverage.reasons import CAPTURED_LESS, general
from sparsepass.measure.coverage.tiny import ABSENT, settle
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.reports.explain import graph_report, versions
from sparsepass.rewriting import record
from sparsepass.types import Budget, Phase

VOCABULARY, HIDDEN, LENGTH, BATCH = 512, 256, 2048, 2
MOST = 2.0
"""Times eager's error."""
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
    "initializer_range": 0.08,  # scores that differ: with the usual 0.02 attention is near a mean
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("AutoModelForCausalLM", "llama", COMMON | {"num_key_value_heads": 2, "head_dim": 128}),
    "Qwen3": ("AutoModelForCausalLM", "qwen3", COMMON | {"num_key_value_heads": 2, "head_dim": 128}),
    "Gemma2": (
        "AutoModelForCausalLM",
        "gemma2",
        COMMON
        | {"num_key_value_heads": 2, "head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 512}
        | {"layer_types": SLIDING},
    ),
    "GPT-OSS": (
        "AutoModelForCausalLM",
        "gpt_oss",
        COMMON
        | {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128, "layer_types": SLIDING}
        | {"num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V3": (
        "AutoModelForCausalLM",
        "deepseek_v3",
        COMMON
        | {"num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 2},
    ),
    "T5": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
        | {"num_decoder_layers": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "ModernBERT": (
        "AutoModelForMaskedLM",
        "modernbert",
        COMMON | {"local_attention": 256, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}


def build(name: str, implementation: str, device: str) -> Any:
    """The model in float32, its weights rounded to bf16."""
    import transformers

    transformers.logging.set_verbosity_error()
    auto, kind, sizes = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    config._experts_implementation = "eager"  # the grouped products take no float64
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, auto).from_config(config, attn_implementation=implementation, dtype=torch.float32)
    settle(model)
    return cast(model.eval(), torch.bfloat16, torch.float32)


def cast(model: Any, *dtypes: torch.dtype) -> Any:
    """The parameters in the last of the types, by way of the others; buffers, such as rotary frequencies, stay."""
    for parameter in model.parameters():
        for dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
    return model


def inputs_of(name: str, padded: bool, device: str) -> tuple[dict[str, Any], Any]:
    """The inputs, and which rows of the logits count. Padding is at the end: every row sees something."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    given = {"input_ids": ids}
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if padded:
        real[0, LENGTH - LENGTH // 4 :] = False
        given["attention_mask"] = real.long()
    if name == "T5":
        given["decoder_input_ids"] = ids[:, : LENGTH // 2]
        real = torch.ones(BATCH, LENGTH // 2, dtype=torch.bool)
    moved: dict[str, Any] = {key: tensor.to(device) for key, tensor in given.items()}
    if name != "ModernBERT":
        moved["use_cache"] = False
    return moved, real.to(device)


def compiled(model: Any, density: float, inductor: bool) -> Any:
    budget = Budget("pooled_topk", {"density": density})
    options = {
        "sparsepass.policy": Policy(f"density {density}", (Rule(None, budget),)),
        "sparsepass.always_sparse": True,
        "sparsepass.inductor": inductor,
    }
    torch._dynamo.reset()
    return torch.compile(model, backend=sparsepass.backend, options=options, dynamic=False)


def distance(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Norm of the difference over the exact one's, and the largest difference over the largest value."""
    off = found.double() - exact
    return (
        float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(exact)),
        float(off.abs().max() / exact.abs().max()),
    )


def sites_of(seen: record.Recording) -> list[dict[str, Any]]:
    """What became of every site, once for each time it ran: kernel, share of blocks, or why it is dense."""
    found: list[dict[str, Any]] = []
    for index, (graph, before, runs) in enumerate(zip(seen.ran, seen.before, seen.runs_before, strict=True)):
        report = graph_report(index, graph, before, runs)
        inside: list[dict[str, Any]] = []
        for site in report.sites:
            name, kernel = site.entry.site.name, site.kernel
            if kernel is not None:
                inside.append({"site": name, "kernel": kernel, "density": site.density_achieved})
            elif site.entry.site.phase is Phase.PREFILL:
                inside.append({"site": name, "reason": site.entry.reason or "did not run"})
        inside += [{"site": skip.nodes[0] if skip.nodes else "", "reason": skip.reason} for skip in report.refused]
        found += inside * report.runs
    return found


@torch.no_grad()
def check(name: str, implementation: str, padded: bool, inductor: str, device: str) -> dict[str, Any]:
    """One model, implementation and phase."""
    began = time.monotonic()
    found: dict[str, Any] = {
        "model": name,
        "implementation": implementation,
        "phase": "padded" if padded else "prefill",
    }
    model = build(name, implementation, device)
    given, real = inputs_of(name, padded, device)
    exact = cast(copy.deepcopy(model), torch.float64)(**given).logits[real].double()
    low = cast(model, torch.bfloat16)
    with AttentionCounter((HIDDEN, 512, VOCABULARY)) as counted:
        eager = low(**given).logits[real]
    found["called"] = sum(counted.sites.values())
    found["finite"] = bool(exact.isfinite().all())
    found["eager"] = distance(eager, exact)
    for density in (1.0, 0.5):
        use = inductor == "all" or (inductor == "some" and density == 1.0 and not padded)
        with record.recording() as seen:
            got = compiled(low, density, use)(**given).logits[real]
        sites = sites_of(seen)
        norm, largest = distance(got, exact)
        found[str(density)] = {
            "inductor": use,
            "error": (norm, largest),
            "ratio": (norm / found["eager"][0], largest / found["eager"][1]),
            "finite": bool(got.isfinite().all()),
            "rewritten": sum("kernel" in site for site in sites),
            "sites": sites,
        }
    found["seconds"] = round(time.monotonic() - began, 1)
    found["verdict"] = verdict(found)
    return found


def verdict(found: dict[str, Any]) -> str:
    """``ok``, or what failed; sites that stay dense are no failure of the numbers, but are said."""
    full, half = found["1.0"], found["0.5"]
    if not (found["finite"] and full["finite"] and half["finite"]):
        return "NOT FINITE"
    if full["ratio"][0] > MOST:
        return f"ERROR {full['ratio'][0]:.2f} x EAGER'S"
    if any(site.get("density", 0) >= 1 for site in half["sites"]):
        return "NOTHING LEFT OUT"
    if not full["rewritten"]:
        return "NOTHING REWRITTEN"
    if full["rewritten"] < found["called"]:
        return f"ok, {found['called'] - full['rewritten']} dense"
    return "ok"


def table(records: list[dict[str, Any]]) -> str:
    """The checks, the kernels and the reasons, as Markdown."""
    rows = [
        "| model | attention | phase | sites | rewritten | kernels | eager bf16 | density 1 | ratio (largest) | "
        "density 0.5: blocks, error | |",
        "|---|---|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    reasons: Counter[str] = Counter()
    for found in records:
        head = f"| {found['model']} | {found['implementation']} | {found['phase']} "
        if "error" in found:
            rows.append(f"{head}| | | | | | | | {found['error']} |")
            continue
        full, half = found["1.0"], found["0.5"]
        kernels = Counter(site["kernel"] for site in full["sites"] if "kernel" in site)
        blocks = [site["density"] for site in half["sites"] if site.get("density") is not None]
        share = f"{sum(blocks) / len(blocks):.2f}, " if blocks else "-, "
        rows.append(
            f"{head}| {found['called']} | {full['rewritten']} | "
            + ", ".join(f"{count} {kernel}" for kernel, count in kernels.items())
            + f" | {found['eager'][0]:.2e} | {full['error'][0]:.2e} | {full['ratio'][0]:.2f} ({full['ratio'][1]:.2f})"
            + f" | {share}{half['error'][0]:.1e} | {found['verdict']} |"
        )
        for site in full["sites"]:
            if "reason" in site:
                reasons[f"{found['model']}, {found['implementation']}: {general(site['reason'])}"] += 1
        lost = found["called"] - len(full["sites"])
        if lost > 0:
            reasons[f"{found['model']}, {found['implementation']}: {CAPTURED_LESS}"] += lost
    rows += ["", *(f"dense, {count} x {reason}" for reason, count in reasons.items())]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--implementations", nargs="+", choices=("eager", "sdpa"), default=["eager", "sdpa"])
    parser.add_argument("--phases", nargs="+", choices=("prefill", "padded"), default=["prefill", "padded"])
    parser.add_argument(
        "--inductor",
        choices=("none", "some", "all"),
        default="some",
        help="which rewritten graphs go through Inductor; some: prefill at density 1",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=0.0, help="seconds after which no further check is begun")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, records = time.monotonic(), []
    cases = [(n, i, p) for n in options.models for i in options.implementations for p in options.phases]
    for place, (name, implementation, phase) in enumerate(cases):
        if options.time_limit and time.monotonic() - began > options.time_limit:
            print(f"Out of time: {len(cases) - place} checks were not made.")
            break
        try:
            found = check(name, implementation, phase == "padded", options.inductor, options.device)
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0][:160]
            found = {"model": name, "implementation": implementation, "phase": phase}
            found |= {"error": "ok, not there"} if ABSENT in text else {"error": f"{type(error).__name__}: {text}"}
            found["verdict"] = found["error"]
        records.append(found)
        print(f"[{place + 1}/{len(cases)}] {name} {implementation} {phase}", found["verdict"], flush=True)
        if options.out is not None:
            device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
            content = {"versions": versions(), "device": device, "length": LENGTH, "batch": BATCH, "records": records}
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(records))
    return int(any(not found["verdict"].startswith("ok") for found in records))


if __name__ == "__main__":
    raise SystemExit(main())
