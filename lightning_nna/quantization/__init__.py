"""Low-bit weights: the General Quantizer, S8BQAT, and uniform baselines."""
