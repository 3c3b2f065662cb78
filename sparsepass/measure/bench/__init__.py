"""Measure kernels, selection, whole attention ops and models against the other implementations on this device.

``sparsepass bench`` is the command; ``python -m sparsepass.measure.bench`` is the same with the standard library alone.
Use ``register_peer`` to time an implementation of your own beside ours. ``docs/benchmarks.md`` says how to read the
result.
"""

from sparsepass.measure.bench.peers import Peer, register_peer
from sparsepass.measure.bench.problem import Problem, Shape

__all__ = ["Peer", "Problem", "Shape", "register_peer"]
