"""What one site gets under one task class: a budget, or dense with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import value
from sparsepass.graph.sizes import same_size
from sparsepass.graph.strides import restoring
from sparsepass.kernels.support import why_not
from sparsepass.masks.recognize import MaskTerms
from sparsepass.methods import decode_budget, encode_budget, make_method
from sparsepass.methods.rows import is_row_text
from sparsepass.planning.crossover import Verdict, full_wins, sparse_wins
from sparsepass.policies.policy import Policy
from sparsepass.request import observer as watch
from sparsepass.request.hints import current_hint
from sparsepass.sites import FoundSite
from sparsepass.types import (
    BY_LENGTH,
    BY_ROW,
    DENSE,
    EXACT,
    TASKS,
    Align,
    AttentionSite,
    Budget,
    LengthBucket,
    Phase,
    PlanEntry,
    Rows,
    Skip,
    TaskClass,
)


@dataclass(frozen=True)
class Settings:
    """What the user asked of one compiled region."""

    policy: Policy
    task: TaskClass | Rows | None = None
    """Class, or the class of each row, when no hint is in force; None is the hardest."""
    always_sparse: bool = False
    """Ignore the measured crossover: every site with a budget under dense goes through the sparse kernel."""

    def given(self) -> TaskClass | Rows:
        """The hint in force, as given."""
        return current_hint() or self.task or TaskClass.UNKNOWN

    def wanted(self) -> TaskClass | Rows:
        """The class, or each row's, whose budgets hold now: the hint's, unless a monitor raised it."""
        return watch.in_force(self.given())


def refusal(found: FoundSite) -> Skip | None:
    """Why this site cannot be rewritten whatever the budget, or None."""
    site, attention = found.site, found.attention
    if site.phase is Phase.DECODE:
        return Skip("decode site: one query row, stays dense for now")
    if attention.dropout_p != 0.0:
        return Skip(f"attention dropout is {attention.dropout_p}; the sparse kernels have none (call model.eval())")
    values = [value(operand) for operand in attention.operands]
    if not all(isinstance(held, torch.Tensor) for held in values):
        return Skip("the graph carries no shapes for query, key or value")
    if found.gradients:
        return Skip("gradients are needed here; run under torch.no_grad() or torch.inference_mode()")
    if restoring(held := value(attention.output)) is None:
        return Skip(f"the strides of its output, {list(held.stride())} for {list(held.shape)}, cannot be kept")
    if isinstance(found.terms, Skip):
        return found.terms
    heads, kv_heads = found.query_shape[1], found.key_shape[1]
    if same_size(kv_heads, 0) or not _is_multiple(heads, kv_heads):
        known = (
            "are no multiple"
            if isinstance(heads, int) and isinstance(kv_heads, int)
            else "are not known to be a multiple"
        )
        return Skip(f"{heads} query heads {known} of {kv_heads} key/value heads")
    if not all(torch_private.can_fix(size) for size in found.head_sizes):
        return Skip("the head size is marked as dynamic, and the kernels are made for one; mark it static")
    reason = why_not(torch.device(site.device), getattr(torch, site.dtype), site.head_dim, site.v_head_dim)
    return Skip(reason) if reason else None


def entry_for(found: FoundSite, task: TaskClass, bucket: LengthBucket | None, settings: Settings) -> PlanEntry:
    if bucket is None:
        return _entry_by_length(found, task, settings)
    budget = settings.policy.site_budget(task, bucket, found.layer, _heads(found))
    if budget.dense:
        reason = "the hint is dense" if task is TaskClass.DENSE else f"the policy is dense for {task} at {bucket}"
        return exact_entry(found, reason, bucket)
    if not settings.always_sparse:
        verdict = verdict_for(found, budget, bucket)
        if not verdict.wins:
            return exact_entry(found, verdict.reason, bucket)
    return PlanEntry(found.site, budget, rewritten=True)


def policy_budgets(found: FoundSite, bucket: LengthBucket, settings: Settings) -> tuple[Budget, ...]:
    """What the policy gives each class, in the order of ``TASKS``, whether it pays or not."""
    return tuple(settings.policy.site_budget(task, bucket, found.layer, _heads(found)) for task in TASKS)


def _is_multiple(size: int | torch.SymInt, of: int | torch.SymInt) -> bool:
    rest: int | torch.SymInt = size % of  # type: ignore[operator]  # one may be a symbol, the other not
    return same_size(rest, 0)


def _heads(found: FoundSite) -> int | None:
    """Query heads of a site; None where their number is dynamic, which no rule of a policy may turn into a guard."""
    return found.site.heads if isinstance(found.site.heads, int) else None


def entry_of_text(found: FoundSite, text: str, reason: str) -> PlanEntry:
    """The entry of a site whose budget is known as text; ``reason`` is for a dense one."""
    if ";" in text:
        return PlanEntry(found.site, Budget(BY_LENGTH, {"table": text}), rewritten=True)
    if is_row_text(text):
        return PlanEntry(found.site, Budget(BY_ROW, {"table": text}), rewritten=True)
    budget = decode_budget(text)
    return dense_entry(found, reason) if budget.dense else PlanEntry(found.site, budget, rewritten=True)


def _entry_by_length(found: FoundSite, task: TaskClass, settings: Settings) -> PlanEntry:
    """The length cannot be guarded (unbacked, or a range the user fixed): hand the op the whole table."""
    rows = []
    for bucket in settings.policy.buckets:
        entry = entry_for(found, task, bucket, settings)
        rows.append(("*" if bucket.high is None else str(bucket.high), encode_budget(entry.budget)))
    if all(text == rows[0][1] == encode_budget(DENSE) for _, text in rows):
        return dense_entry(found, f"the policy is dense for {task} at every length")
    table = ";".join(f"{high}={text}" for high, text in rows)
    return PlanEntry(found.site, Budget(BY_LENGTH, {"table": table}), rewritten=True)


def verdict_for(found: FoundSite, budget: Budget, bucket: LengthBucket) -> Verdict:
    site = found.site
    device = torch.device(site.device)
    length = equivalent_length(site, bucket)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    method = make_method(budget)
    cost = method.cost_at(length)
    verdict = sparse_wins(
        device_name=name,
        device_type=device.type,
        dtype=site.dtype,
        head_dim=site.head_dim,
        length=length,
        density=cost,
    )
    if cost == method.density_at(length):
        return verdict
    beside = f" The cost of {method.text()} is counted: that of pooled_topk at density {cost:.3g}."
    return replace(verdict, reason=verdict.reason + beside)


def limit_for(found: FoundSite, budget: Budget, bucket: LengthBucket, settings: Settings) -> float:
    """The largest mean density at which a budget's method pays in a bucket; infinite where that is not asked."""
    return float("inf") if settings.always_sparse else verdict_for(found, budget, bucket).max_density


def equivalent_length(site: AttentionSite, bucket: LengthBucket) -> int:
    """Length of the square problem with the same work; for a symbolic length the bucket's lower edge, to be safe."""
    longest = site.kv_len if isinstance(site.kv_len, int) else bucket.low + 1
    rows = site.q_len if isinstance(site.q_len, int) else longest
    return int((min(rows, longest) * longest) ** 0.5)


def exact_entry(found: FoundSite, reason: str, bucket: LengthBucket) -> PlanEntry:
    """Everything visible: by the block-sparse kernel where that was measured to be faster, else by the dense one."""
    site = found.site
    device = torch.device(site.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    faster = full_wins(
        device_name=name,
        device_type=device.type,
        dtype=site.dtype,
        head_dim=site.head_dim,
        length=equivalent_length(site, bucket),
        flagged=_has_flag(found),
    )
    return PlanEntry(site, EXACT, reason=reason, rewritten=True) if faster else dense_entry(found, reason)


def dense_entry(found: FoundSite, reason: str) -> PlanEntry:
    return PlanEntry(found.site, DENSE, reason=reason, rewritten=_dense_without_mask(found))


def _dense_without_mask(found: FoundSite) -> bool:
    """Whether the dense kernel can do without the mask: it is causal or full, which SDPA takes as a flag.

    An SDPA site that has no mask already is left alone.
    """
    if found.attention.spelling == "sdpa" and not found.attention.masks:
        return False
    return _has_flag(found)


def _has_flag(found: FoundSite) -> bool:
    """Whether SDPA can be told of the site's mask by a flag, without a tensor."""
    terms = found.terms
    if not isinstance(terms, MaskTerms) or terms.padding or terms.segments is not None or terms.whole:
        return False
    if not found.attention.plain:
        return False
    band = terms.band
    return band.left < 0 and (band.right < 0 or (band.right == 0 and band.align is Align.TOP_LEFT))


def budget_text(budget: Budget) -> str:
    """The text that the graph op carries for a budget."""
    return str(budget.params["table"]) if budget.method in (BY_LENGTH, BY_ROW) else encode_budget(budget)


def by_row(budget: Budget) -> bool:
    """Whether a budget differs by row of the batch, at some length at least."""
    return budget.method in (BY_LENGTH, BY_ROW) and is_row_text(str(budget.params["table"]))
