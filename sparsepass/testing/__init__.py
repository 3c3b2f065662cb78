"""Inputs, strategies, references and checks for attention kernels over block lists, for our tests and for yours."""

from sparsepass.testing.inputs import StructuredInputs, structured_inputs
from sparsepass.testing.mass import attention_error, block_mass, kept_mass

__all__ = ["StructuredInputs", "attention_error", "block_mass", "kept_mass", "structured_inputs"]
