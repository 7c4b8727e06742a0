"""The type checker that jaxtyping applies to every annotated call while tests run."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is an acceptable float, as PEP 484 says and as `threshold=1` in a call expects.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
