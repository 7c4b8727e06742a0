"""Estimates of a metric under temporal shift, and the callback that watches one."""
