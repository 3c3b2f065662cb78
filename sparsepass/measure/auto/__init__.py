"""Budgets that read the request: a cheap prefill first, and a denser one where its own signs say that it fell short."""

from sparsepass.measure.auto.attach import Attached, Decision, attach, detach
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.probe import Probe
from sparsepass.measure.auto.router import Router

__all__ = ["Attached", "AutoError", "Decision", "Probe", "Router", "attach", "detach"]
