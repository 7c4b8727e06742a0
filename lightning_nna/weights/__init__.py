"""What quantization and pruning share: pipeline, base callback, selection, codebooks, reports."""
