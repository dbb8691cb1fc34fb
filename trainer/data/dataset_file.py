"""A data set that a program holds as a file, or a folder, that the trainer reads. It stays in the run's folder: what was trained on
can be looked at, and trained on again."""

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset

from services.errors import DataError
from services.process.files import cannot_write
from trainer.data.sources import quiet_datasets


def write_dataset(dataset: Dataset, path: Path) -> str:
    """Write a data set as `datasets` keeps it: as fast as it can be copied, and with the types of its columns; returns the path.

    Raises:
        OutputError: the folder cannot be written.
    """
    beside, before = (path.with_name(f".{path.name}.{end}") for end in ("part", "before"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        with quiet_datasets():
            dataset.with_format(None).save_to_disk(str(beside))
        if path.exists():  # the data set may be the one in this folder
            path.replace(before)
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
    return str(path)


def write_rows(name: str, rows: Iterable[Mapping[str, Any]], path: Path, limit: int | None = None) -> str:
    """Write an IterableDataset or a list of dicts, a row of JSON a line; returns the path.

    Args:
        name: of the argument, for errors.
        limit: rows that are taken, of a stream that may not end.

    Raises:
        DataError: it holds no rows, or a row holds what JSON does not.
        OutputError: the file cannot be written.
    """
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
        more = "; choose one, e.g. dataset['train']" if isinstance(rows, Mapping) else ""
        raise DataError(
            f"{name} is a {type(rows).__name__}; give a datasets.Dataset, an IterableDataset or a list of dicts{more}"
        )
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            for number, row in enumerate(itertools.islice(rows, limit), start=1):
                file.write(_line(name, number, row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return str(path)


def _line(name: str, number: int, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{name}, row {number}: a row is a dict, got a {type(row).__name__}")
    for column, value in row.items():
        if not isinstance(column, str):
            raise DataError(f"{name}, row {number}: the column {column!r} is not named by a text")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{name}, row {number}: the column {column!r} holds a {type(value).__name__} that is no JSON ({error}); remove the "
                "column, or make it text, numbers, lists and dicts"
            ) from error
    line = json.dumps(dict(row))  # ASCII: a lone surrogate stays what it is, and the reader names its row
    return line
