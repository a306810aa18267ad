"""Training a byte-level MoE language model: `python -m machmoe train`."""
