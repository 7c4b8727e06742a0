"""Benchmarks: each module is a study that measures, stores rows and writes a report from them.

A study is a grid of runs (:mod:`~recipes.benchmark.grid`), the fields of a Markdown template
(:mod:`~recipes.benchmark.report`) and a command line, ``python -m recipes.benchmark.<study>``.
Rows and reports are in ``docs/results``.
"""
