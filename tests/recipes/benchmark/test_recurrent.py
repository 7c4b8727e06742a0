"""Rows and page of the comparison of both forms of the LSTM."""

from __future__ import annotations

from recipes.benchmark.recurrent import STUDY, AccuracyRun, CostRun


def test_rows_are_summarized() -> None:
    rows = []
    for form in ("sequence", "elementary"):
        rows += CostRun(8, 1, form, "ethos-u55-128").rows()
        rows += AccuracyRun(0, form, "litert-int8", updates=5).rows()
    sequence, elementary = (row for row in rows if "cycles" in row)
    assert sequence["cycles"] > 0 < elementary["cycles"]
    assert not sequence["cpu"]
    assert not elementary["cpu"]
    narrow, wide = (row for row in rows if "snr_db" in row)
    assert wide["snr_db"] > narrow["snr_db"] > 20
    page = STUDY.render([{"command": "python", **row} for row in rows])
    assert f"| 8 | 1 | ethos-u55-128 | sequence | {sequence['cycles']:,} |" in page
    assert f"| `litert-int8` | elementary | {wide['snr_db']:.1f} |" in page
