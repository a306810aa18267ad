"""Timing of the MoE layer beside its rivals: `python -m machmoe bench`."""
