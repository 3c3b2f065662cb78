"""Budgets that read the request: a cheap prefill first, and a denser one where its own signs say that it fell short."""

from sparsepass.auto.attach import Attached, Decision, attach, detach
from sparsepass.auto.error import AutoError
from sparsepass.auto.probe import Probe
from sparsepass.auto.router import Router

__all__ = ["Attached", "AutoError", "Decision", "Probe", "Router", "attach", "detach"]
