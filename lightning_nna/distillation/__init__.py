"""Distillation: an emulated network learns the outputs of its own float weights."""
