"""CSV files that people write or edit with a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from snscc_ray.config.errors import UserError


def read_sheet(file: Path) -> list[dict[str, str | None]]:
    """Return the lines of a CSV file with a header, by column.

    Raises UserError for a file that is no such table.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); save it as CSV") from error
    # Spreadsheets of many countries write semicolons.
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{file} is no CSV table ({error}); save it as CSV") from error
