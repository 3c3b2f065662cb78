"""Tasks on token ids, for models that are trained from scratch: one per class. A new one is a file and a line here."""

from __future__ import annotations

from sparsepass.tasks.tokens.aggregation import MostFrequent
from sparsepass.tasks.tokens.drawing import Drawn, TokenTask
from sparsepass.tasks.tokens.multi_hop import Chains
from sparsepass.tasks.tokens.multi_qa import FourFacts
from sparsepass.tasks.tokens.single_qa import OneFact

TOKEN_TASKS: tuple[TokenTask, ...] = (OneFact(), FourFacts(), Chains(), MostFrequent())

__all__ = ["TOKEN_TASKS", "Chains", "Drawn", "FourFacts", "MostFrequent", "OneFact", "TokenTask"]
