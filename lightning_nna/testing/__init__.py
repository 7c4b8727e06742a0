"""Checks that plugins can import: the contract of callbacks and the oracle of operators.

:mod:`lightning_nna.testing.contract` has the promises that every callback keeps,
:mod:`lightning_nna.testing.operator_oracle` those of every operator, and
:mod:`lightning_nna.testing.replay` compares emulated instructions with a runtime's; the latter two
need the extra ``deploy``.
"""

from lightning_nna.testing.modules import SmallNet, SmallRecurrentModule

__all__ = ["SmallNet", "SmallRecurrentModule"]
