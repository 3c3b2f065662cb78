"""Building, launching and tuning kernels."""
