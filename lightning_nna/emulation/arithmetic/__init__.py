"""Integer kernels, fixed point and tables: mathematics that needs nothing of the emulation."""
