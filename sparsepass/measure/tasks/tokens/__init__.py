"""Tasks on token ids, for models that are trained from scratch: one per class. A new one is a file and a line here."""

from __future__ import annotations

from sparsepass.measure.tasks.tokens.aggregation import MostFrequent
from sparsepass.measure.tasks.tokens.drawing import Drawn, TokenTask
from sparsepass.measure.tasks.tokens.multi_hop import Chains
from sparsepass.measure.tasks.tokens.multi_qa import FourFacts
from sparsepass.measure.tasks.tokens.single_qa import OneFact

TOKEN_TASKS: tuple[TokenTask, ...] = (OneFact(), FourFacts(), Chains(), MostFrequent())

__all__ = ["TOKEN_TASKS", "Chains", "Drawn", "FourFacts", "MostFrequent", "OneFact", "TokenTask"]
