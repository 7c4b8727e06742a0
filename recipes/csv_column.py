"""Read a sequence of numbers from a CSV file whose form is not known: ``read_column``.

Delimiter, header and column are inferred where there is no doubt. Otherwise one error lists the
columns.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_nna.name_lists import listed
from recipes.nearest import did_you_mean

_DELIMITERS = ("\t", ";", ",")
#: Columns that count rows instead of measuring something, in the order of preference.
_COUNTERS = ("step", "global_step", "iteration", "epoch", "time", "index", "")


@dataclass(frozen=True)
class Column:
    """Values of a column.

    Attributes:
        name: Name of the column; ``value`` for the only one of a file without a header.
        values: Its numbers in the order of rows, without blank cells.
        times: Time of each value; None if no other column counts.
        time_name: Name of the column of times; ``validation`` without one.
    """

    name: str
    values: list[float]
    times: list[float] | None = None
    time_name: str = "validation"


@dataclass(frozen=True)
class _Table:
    """Cells of a file by row, with the number of each row's line."""

    source: Path
    names: list[str]
    rows: list[tuple[int, list[str]]] = field(repr=False)
    decimal_comma: bool

    def cells(self, index: int) -> list[tuple[int, str]]:
        """Return the cells of a column that are not blank."""
        cells = ((line, row[index].strip()) for line, row in self.rows if index < len(row))
        return [(line, cell) for line, cell in cells if cell]

    def number(self, cell: str) -> float | None:
        """Return the number in a cell; None if there is none."""
        return _number(cell, decimal_comma=self.decimal_comma)


def read_column(source: Path, name: str | None) -> Column:
    """Read a column of a CSV file.

    The delimiter is a comma, a semicolon (then with decimal commas, too) or a tab. A first row of
    numbers alone is no header; the columns then have the names 1, 2 and so on.

    Args:
        source: CSV file, or folder with one ``metrics.csv`` in it or below.
        name: Name of the column; None for the only one with numbers that does not count rows.

    Raises:
        FileNotFoundError: If there is no such file, or a folder has no metrics.
        ValueError: If the column is missing, in doubt or there twice, if a value is no number, or
            if a folder has several logs; the message names the file and the line.
    """
    table = _read(_file_of(source))
    index = _index_of(table, name)
    values: list[float] = []
    lines: list[int] = []
    for line, cell in table.cells(index):
        number = table.number(cell)
        if number is None:
            raise ValueError(
                f"{table.source}, line {line}: {cell!r} in column {table.names[index]!r} is no "
                f"number{_others(table, index)}"
            )
        values.append(number)
        lines.append(line)
    return Column(table.names[index], values, *_times(table, index, lines))


def _file_of(source: Path) -> Path:
    """Return the file that is meant by a file or a folder."""
    if source.is_file():
        return source
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    logs = sorted(source.rglob("metrics.csv"))
    if not logs:
        raise FileNotFoundError(f"{source} has no metrics.csv in it")
    if len(logs) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in logs)
        raise ValueError(f"{source} has a log for every start of its run; name one: {names}")
    return logs[0]


def _read(source: Path) -> _Table:
    try:
        # Spreadsheets begin a file with a byte-order mark.
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text in UTF-8: {error}") from error
    if "\0" in text:
        raise ValueError(f"{source} is no CSV file: it has zero bytes")
    delimiter, rows = _divided(source, text)
    if not rows:
        raise ValueError(f"{source} is empty")
    decimal_comma = delimiter == ";"
    first = [cell.strip() for cell in rows[0][1]]
    has_header = any(_number(cell, decimal_comma=decimal_comma) is None for cell in first if cell)
    if has_header:
        names, rows = first, rows[1:]
    else:
        names = ["value"] if len(first) == 1 else [str(1 + index) for index in range(len(first))]
    for line, row in rows:
        if len(row) > len(names):
            raise ValueError(
                f"{source}, line {line} has {len(row)} cells, and the first row has {len(names)}: "
                f"columns are divided by commas, semicolons (with decimal commas) or tabs"
            )
    return _Table(source, names, rows, decimal_comma)


def _divided(source: Path, text: str) -> tuple[str, list[tuple[int, list[str]]]]:
    """Return the delimiter that divides every row into as many cells, more than one, and the rows.

    Without any it is the comma. A comma comes last, since decimal commas divide rows alike, too.
    """
    for delimiter in (*_DELIMITERS, _DELIMITERS[-1]):
        rows = _rows(source, text, delimiter)
        widths = {len(row) for _, row in rows}
        if len(widths) == 1 and widths != {1}:
            break
    return delimiter, rows


def _rows(source: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Divide a text into rows that are not blank, with the number of their last line."""
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num} cannot be read: {error}") from error


def _number(cell: str, *, decimal_comma: bool) -> float | None:
    try:
        return float(cell.replace(",", ".") if decimal_comma else cell)
    except ValueError:
        return None


def _candidates(table: _Table) -> list[int]:
    """Return the columns that may be meant: those that have numbers and count nothing."""
    return [
        index
        for index, name in enumerate(table.names)
        if name.lower() not in _COUNTERS
        and any(table.number(cell) is not None for _, cell in table.cells(index))
    ]


def _index_of(table: _Table, name: str | None) -> int:
    """Return the position of a column that is named, or of the only one that can be meant."""
    names = [each for each in table.names if each]
    if name is None:
        candidates = _candidates(table)
        if not candidates and len(table.names) == 1:
            return 0
        if len(candidates) == 1 and table.names.count(table.names[candidates[0]]) == 1:
            return candidates[0]
        best = table.names[candidates[-1]] if candidates else names[-1] if names else "NAME"
        raise ValueError(
            f"{table.source} has {len(table.names)} columns: {listed(names, 40)}; say which one "
            f"is the sequence, as column={best}"
        )
    if name not in table.names:
        hint = did_you_mean(name, names)
        raise ValueError(
            f"{table.source} has no column {name!r}{hint or ';'} it has {listed(names, 40)}; "
            "name one by column=..."
        )
    if (count := table.names.count(name)) > 1:
        raise ValueError(f"{table.source} has {count} columns {name!r}")
    return table.names.index(name)


def _others(table: _Table, index: int) -> str:
    """Return the end of a message that lists the other columns with numbers."""
    others = [table.names[each] for each in _candidates(table) if each != index]
    return f"; columns with numbers: {listed(others, 40)}, as column={others[0]}" if others else ""


def _times(
    table: _Table, index: int, lines: Sequence[int]
) -> tuple[list[float], str] | tuple[None, str]:
    """Return the times of the rows on these lines, and what they count."""
    columns = {name.lower(): position for position, name in enumerate(table.names)}
    for counter in _COUNTERS:
        if counter and counter in columns and columns[counter] != index:
            cells = dict(table.cells(columns[counter]))
            times = [table.number(cells.get(line, "")) for line in lines]
            known = [time for time in times if time is not None]
            # A metric that is logged twice at a step stays in the order of rows.
            if len(known) == len(times) and known == sorted(known):
                return known, table.names[columns[counter]]
    return None, "validation"
