"""The share of the attention mass that listed blocks keep, at sampled rows."""
