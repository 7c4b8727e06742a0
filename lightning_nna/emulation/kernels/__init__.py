"""Fused kernels: one launch on a device for what every operator does to its numbers."""
