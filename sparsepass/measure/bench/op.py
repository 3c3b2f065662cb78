"""``bench selection`` and ``bench op``: a method's selection alone, and with the attention over what it selected."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench import ours
from sparsepass.measure.bench.baselines import dense_names
from sparsepass.measure.bench.check import Expected, invalid_lists
from sparsepass.measure.bench.kernel import check_baselines
from sparsepass.measure.bench.options import OpOptions, SelectionOptions
from sparsepass.measure.bench.peers import Does, installed_peers, load_peers
from sparsepass.measure.bench.problem import listed_flops
from sparsepass.measure.bench.progress import Reporter
from sparsepass.measure.bench.result import Record, Result, shape_of, timed
from sparsepass.measure.bench.sweeps import Case, cases
from sparsepass.measure.bench.timing import graphed
from sparsepass.measure.bench.trial import Bench, first_line, measure


def run_selection(options: SelectionOptions, device: torch.device, result: Result, reporter: Reporter) -> Result:
    """Measures selection and, for its share, attention over the lists it gives."""
    chosen = cases(options.methods)
    return measure(result, options, device, reporter, partial(_selection, options, chosen), _add_shares)


def run_op(options: OpOptions, device: torch.device, result: Result, reporter: Reporter) -> Result:
    """Measures selection and attention together against dense kernels. Raises ``OptionError``."""
    check_baselines(options.baselines, dense_names(device))
    for name in options.implementations:
        ours.check_implementation(name, device)
    if options.peer_file is not None:
        load_peers(options.peer_file)
    chosen = cases(options.methods)
    return measure(result, options, device, reporter, partial(_op, options, chosen), _add_shares)


def _selection(options: SelectionOptions, chosen: list[Case], bench: Bench, reporter: Reporter) -> None:
    reporter.steps("checking", len(chosen))
    for case in chosen:
        found = _select(bench, case)
        if found is not None:
            _add_parts(bench, case, *found, graphs=options.graphs)
        reporter.advance()


def _op(options: OpOptions, chosen: list[Case], bench: Bench, reporter: Reporter) -> None:
    reporter.steps("checking", len(chosen))
    bench.add_dense(options.baselines)
    dense = bench.sample.dense()
    for case in chosen:
        found = _select(bench, case)
        if found is None:
            continue
        _add_parts(bench, case, *found, graphs=False)
        lists, common, expected = found
        for name in options.implementations:
            variant = "sparsepass" if name == ours.AUTO else f"sparsepass {name}"
            call = partial(ours.operator, bench.problem, case.method, name)
            entry = {"variant": variant, "does": "op", **common}
            record = bench.try_out(entry, lambda call=call: call, expected)  # type: ignore[misc]
            _add_error(bench, record, call)
            if options.graphs and bench.problem.device.type == "cuda" and record.get("correct"):
                entry = {"variant": f"{variant}, graph", "does": "op", **common}
                replayed = bench.try_out(
                    entry,
                    lambda call=call: graphed(call),  # type: ignore[misc, arg-type, return-value]
                    expected,
                )
                if "error_over_dense" in record:
                    replayed["error_over_dense"] = record["error_over_dense"]
        del lists
        reporter.advance()
    for peer in installed_peers():
        if peer.does == Does.APPROXIMATE:
            entry = {"variant": peer.name, "peer": True, "does": "op", "method": peer.name, "method_name": peer.name}
            record = bench.try_out(entry, partial(peer.build, bench.problem, None), dense, judge=False)
            if "error" in record:
                record["error_over_dense"] = record["error"]


def _select(bench: Bench, case: Case) -> tuple[BlockLists, Record, Expected] | None:
    """A method's lists, what they compute, and what attention over them has to give; None if they are wrong."""
    problem, shape = bench.problem, bench.problem.shape
    common: Record = {"method": case.text, "method_name": case.name}
    record: Record = {"variant": "select", "does": "select", **shape.fields(), **common}
    try:
        case.method.prepare(problem.device)
        counter = torch.zeros(3, dtype=torch.int64, device=problem.device)
        lists = ours.select(problem, case.method, counter)
        again = ours.select(problem, case.method)
        why = invalid_lists(lists, problem) or ("" if _same(lists, again) else "two calls gave different lists")
        ours.attend(problem, lists, counter=counter)
    except Exception as error:  # a method that fails here is a finding; the others are still measured
        bench.records.append({**record, "failed": f"{type(error).__name__}: {first_line(error)}"})
        return None
    _, computed, visible = (int(count) for count in counter.tolist())
    expected = bench.sample.expected(lists)
    common |= {"block": lists.kv_block, "density_computed": round(computed / max(visible, 1), 5)}
    common |= {"mass": round(expected.mass, 5)}
    columns = getattr(lists, "columns", None)
    if columns is not None:
        common["columns"] = round(float(columns.num.double().mean()), 1)
    bench.records.append({**record, **common, "correct": not why, **({"why": why} if why else {})})
    return None if why else (lists, common, expected)


def _same(one: BlockLists, other: BlockLists) -> bool:
    pairs = [(one.kv_num_blocks, one.kv_indices, other.kv_num_blocks, other.kv_indices)]
    columns, other_columns = getattr(one, "columns", None), getattr(other, "columns", None)
    if (columns is None) != (other_columns is None):
        return False
    if columns is not None and other_columns is not None:
        pairs.append((columns.num, columns.indices, other_columns.num, other_columns.indices))
    for num, indices, other_num, other_indices in pairs:
        used = torch.arange(indices.shape[-1], device=indices.device) < num[..., None]
        if not torch.equal(num, other_num) or bool((used & (indices != other_indices)).any()):
            return False
    return True


def _add_parts(
    bench: Bench, case: Case, lists: BlockLists, common: Record, expected: Expected, *, graphs: bool
) -> None:
    """Selection, whose record ``_select`` has added, and attention over its lists, each timed by itself."""
    selecting = partial(ours.select, bench.problem, case.method)
    bench.runs[len(bench.records) - 1] = selecting
    attending = partial(ours.attend, bench.problem, lists)
    record = {"variant": "attend", "does": "attend", **common}
    if getattr(lists, "columns", None) is None:
        record["flops"], record["flops_visible"] = listed_flops(bench.problem.shape, lists)
    bench.try_out(record, lambda: attending, expected)
    if graphs and bench.problem.device.type == "cuda":
        entry: Record = {"variant": "select, graph", "does": "select", **bench.problem.shape.fields(), **common}
        try:
            replay = graphed(selecting)
        except RuntimeError as error:
            bench.records.append({**entry, "failed": f"{type(error).__name__}: {first_line(error)}"})
            return
        bench.records.append({**entry, "correct": True})
        bench.runs[len(bench.records) - 1] = replay


def _add_error(bench: Bench, record: Record, call: partial[Tensor]) -> None:
    """How far the op is from dense attention: what leaving blocks out costs, rounding included."""
    if not record.get("correct"):
        return
    taken, exact = bench.sample.take(call()), bench.sample.dense().out
    record["error_over_dense"] = float(f"{float((taken - exact).norm() / exact.norm()):.3g}")
    record["rounding_of_dense"] = float(f"{bench.sample.dense().rounding:.3g}")


def _add_shares(records: list[Record]) -> None:
    """Adds to every op the share of its parts that is selection."""
    parts: dict[tuple[object, ...], dict[str, float]] = {}
    for record in records:
        if record.get("does") in ("select", "attend") and timed(record):
            parts.setdefault((shape_of(record), record["method"]), {})[record["variant"]] = record["median_ms"]
    for record in records:
        part = parts.get((shape_of(record), record.get("method")), {})
        if {"select", "attend"} <= part.keys() and record.get("does") in ("op", "select"):
            record["select_over_attend"] = round(part["select"] / part["attend"], 4)
            record["select_share"] = round(part["select"] / (part["select"] + part["attend"]), 4)
