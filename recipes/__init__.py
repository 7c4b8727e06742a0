"""Scripts that are launched, `python -m recipes.train` first of all; not part of the wheel."""
