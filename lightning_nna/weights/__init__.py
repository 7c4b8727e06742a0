"""The shared parts of quantization and pruning: pipeline, base callback, selection, codebooks."""
