"""CSV files that people write or edit with a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from snscc_ray.config.errors import UserError


def read_sheet(file: Path) -> list[dict[str, str | None]]:
    """Return the lines of a CSV file with a header, by column; column names in lower case.

    Raises UserError for a file that is no such table.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except OSError as error:
        why = "it is a folder" if isinstance(error, IsADirectoryError) else error.strerror
        raise UserError(f"{file} cannot be read ({why}); give a CSV file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text; save it as CSV again, with UTF-8 as the character set (in "
            "Excel: CSV UTF-8)"
        ) from error
    # Spreadsheets of many countries write semicolons.
    head, newline, rest = text.partition("\n")
    delimiter = max(",;\t", key=head.count)
    text = head.lower() + newline + rest
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{file} is no CSV table ({error}); save it as CSV") from error
