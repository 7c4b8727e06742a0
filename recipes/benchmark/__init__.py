"""Programs that measure: each writes rows to ``docs/results`` and a page from them."""
