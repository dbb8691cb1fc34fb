"""Text files to rows of JSON text: JSONL, JSON, CSV and TSV, read by one strict reader each.

consumes   a file in UTF-8, with or without a BOM
produces   (row, text): the 1-based line on which a row begins (of a JSON array: its item), and the row as JSON, not yet checked

`datasets` has readers of its own for these formats. They infer one type a column from the first rows: an answer "007" becomes 7,
a column that holds text and numbers fails, of two equal keys one is lost. A row is therefore kept as its text.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from services.errors import DataError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_lines(path: str, option: str) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of the lines that are not blank; `option` names the file in errors.

    A line ends with LF or CRLF; a CR alone, which JSON takes for a space, ends none.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:  # with or without a BOM
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a JSONL file in UTF-8") from error


def read_row_texts(path: str, option: str) -> Iterator[tuple[int, str]]:
    """The rows of a text file as JSON, by what its name ends with; a name of no known kind is that of a JSONL file.

    Raises:
        DataError: the file cannot be read, a JSON array is broken, or a record of a CSV file has not the columns of its header.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _SEPARATORS:
        return _read_csv(path, option, _SEPARATORS[suffix])
    if suffix == ".json":
        return _read_json(path, option)
    return read_lines(path, option)


def _read_json(path: str, option: str) -> Iterator[tuple[int, str]]:
    """The items of a JSON array, each as it is written; a file that begins otherwise is JSONL, whatever it is called."""
    text = _read_text(path, option)
    place = _skip_space(text, 0)
    if text[place : place + 1] != "[":
        yield from read_lines(path, option)
        return
    decoder, row, place = json.JSONDecoder(), 0, _skip_space(text, place + 1)
    while text[place : place + 1] != "]":
        row += 1
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {row}: invalid JSON ({error}); {option} is an array of objects") from error
        yield row, text[place:end]
        place = _skip_space(text, end)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{path}, row {row}: expected `,` or `]` behind it; {option} is an array of objects")
    if _skip_space(text, place + 1) != len(text):
        raise DataError(f"{path}: text behind the end of the array; {option} is one array of objects")


def _read_text(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a JSON file in UTF-8") from error


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _read_csv(path: str, option: str, separator: str) -> Iterator[tuple[int, str]]:
    """Records as objects of texts: "007" stays so, and an empty cell is null."""
    csv.field_size_limit(sys.maxsize)  # Python's own limit is 128 KiB a cell
    began = 1
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = next(reader, [])
            _check_header(path, names)
            began = reader.line_num + 1
            for cells in reader:
                row, began = began, reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}, row {row}: {len(cells)} cells under a header of {len(names)} columns; quote cells that hold "
                        f"{separator!r} or line ends"
                    )
                yield row, json.dumps({name: cell or None for name, cell in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise DataError(f"{path}, row {began}: {error}; {option} is a CSV file with a header") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {option} is a CSV file in UTF-8 with a header") from error


def _check_header(path: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}, row 1: the column {twice!r} is given twice in the header; give it once")
