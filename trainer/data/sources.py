"""Where rows come from: an option's value, or an object, to a table of rows.

    a file       .jsonl, .json, .csv, .tsv: trainer/data/lines.py; .parquet, .arrow: `datasets`; another name: JSONL
    a folder     of such files, split by their names as `datasets` splits them (train-00000-of-00002.parquet, test.csv), or
                 what `save_to_disk` wrote
    owner/name   of a data set on the hub: its files are downloaded and read as above
    an object    a `datasets.Dataset`

No code comes with the data: `datasets` 5 runs no loading scripts, and its readers of pickled files are not among these formats.
"""

import errno
import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError

from services.errors import DataError, DistillServeError
from trainer.data.line_cache import TextRows, read_tables
from trainer.data.tables import Part, RowTable

Result = TypeVar("Result")

# A text file of up to this size is read at every start; a larger one is converted once.
CACHED_FROM_BYTES = 64 << 20

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ARROW = {".parquet": "parquet", ".arrow": "arrow"}
_FORMATS = f"; rows are in files that end with {', '.join((*_TEXT, *_ARROW))}, or what `save_to_disk` wrote"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MEDIA = (datasets.Audio, datasets.Image, datasets.Video, datasets.Pdf)


@dataclass(frozen=True)
class Source:
    """A source as options name it.

    Attributes:
        path: a file, a folder or a hub id.
        option: that gives `path`, e.g. "data.path"; for messages.
        split: None: "train" if there is one, or the only one there is.
        split_option: that gives `split`.
        config_name: of a data set on the hub.
        revision: of a data set on the hub: a branch, a tag or a commit.
    """

    path: str
    option: str
    split: str | None = None
    split_option: str = "data.split"
    config_name: str | None = None
    revision: str | None = None


def open_table(source: Source) -> RowTable:
    """The rows of a source; nothing is tokenised, and hardly anything read of what `datasets` has in its cache.

    Raises:
        DataError: in one line, what of which option cannot be read, and why.
    """
    if not source.path:
        raise DataError(f"{source.option} is empty; give a file, a folder or a data set on the hub")
    path, suffix = Path(source.path), Path(source.path).suffix.lower()
    with quiet_datasets(), _explained(source):
        if path.is_dir():
            _refuse_hub_options(source, "a folder")
            return RowTable(source.path, _open_folder(source, path))
        if path.exists() or suffix in (*_TEXT, *_ARROW) or not _HUB_ID.fullmatch(source.path):
            _refuse_hub_options(source, "a file")
            if source.split not in (None, "train"):
                raise _no_such_split(source, ["train"])
            return RowTable(source.path, [_open_file(source.path, source.option, source.path)])
        return RowTable(source.path, _open_hub(source))


def table_of(dataset: Dataset, name: str) -> RowTable:
    """The rows of an object; `name` is for messages."""
    return RowTable(name, [Part(name, _plain(dataset), is_text=False)])


def _open_file(path: str, option: str, name: str) -> Part:
    """A file on this machine; `name` is what messages call it."""
    kind = _ARROW.get(Path(path).suffix.lower())
    if kind is not None:
        if not Path(path).is_file():
            raise DataError(f"cannot read {path}: no such file; {option} names none")
        return Part(
            name,
            _plain(_prepared(lambda: datasets.load_dataset(kind, data_files=[glob.escape(path)], split="train"))),
            False,
        )
    if not Path(path).is_file() or Path(path).stat().st_size < CACHED_FROM_BYTES:
        return Part(name, Dataset(pa.concat_tables(read_tables(path, option))), is_text=True)
    builder = TextRows(path, option)
    _prepared(builder.download_and_prepare)
    return Part(name, builder.as_dataset(split="train"), is_text=True)


def _open_folder(source: Source, path: Path) -> list[Part]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return [Part(source.path, _plain(splits[_split_of(source, [*map(str, splits)])]), is_text=False)]
    base = glob.escape(str(path.resolve()))  # `datasets` takes names for patterns
    try:
        patterns = get_data_patterns(base)
    except FileNotFoundError as error:
        raise DataError(f"{source.option} = {source.path} is a folder without data files{_FORMATS}") from error
    files = {
        str(split): [file for file in found if Path(file).suffix.lower() in (*_TEXT, *_ARROW)]
        for split, found in DataFilesDict.from_patterns(patterns, base_path=base).items()
    }
    if not any(files.values()):
        raise DataError(f"{source.option} = {source.path} is a folder without data files{_FORMATS}")
    return [_open_file(file, source.option, file) for file in files[_split_of(source, [*files])]]


def _open_hub(source: Source) -> list[Part]:
    """Its text files are read by our readers, everything else by those of `datasets`."""
    builder = datasets.load_dataset_builder(source.path, name=source.config_name, revision=source.revision)
    kind, files = builder.name, builder.config.data_files
    if kind in ("json", "csv") and files is not None:
        urls = list(files[_split_of(source, [*map(str, files)])])
        if all(url.lower().endswith(_TEXT) for url in urls):
            local = datasets.DownloadManager(dataset_name=source.path).download(urls)
            names = (f"{source.path}/{url.partition('@')[2].partition('/')[2]}" for url in urls)
            return [_open_file(str(file), source.option, name) for file, name in zip(local, names, strict=True)]
    _prepared(builder.download_and_prepare)
    split = _split_of(source, [*map(str, builder.info.splits or {})])
    return [Part(source.path, _plain(builder.as_dataset(split=split)), is_text=False)]


def _split_of(source: Source, there: list[str]) -> str:
    """The split that the options name, of those that are there."""
    if source.split is None:
        if len(there) == 1:
            return there[0]
        if "train" in there and source.split_option == "data.split":
            return "train"
        raise DataError(
            f"{source.option} = {source.path} has the splits {', '.join(there)}; choose one with {source.split_option}"
        )
    if source.split not in there:
        raise _no_such_split(source, there)
    return source.split


def _no_such_split(source: Source, there: list[str]) -> DataError:
    return DataError(
        f"{source.split_option} = {source.split}: {source.option} = {source.path} has no such split, only {', '.join(there)}; "
        "choose one of them or leave the option out"
    )


def _refuse_hub_options(source: Source, kind: str) -> None:
    for name in ("config_name", "revision"):
        if (value := getattr(source, name)) is not None:
            raise DataError(
                f"data.{name} = {value} would be ignored: {source.option} = {source.path} is {kind} and no data set on the hub; "
                "leave it out"
            )


def _plain(dataset: Dataset) -> Dataset:
    """Rows as Python values, whatever format was set, without columns of pictures and sounds, which would be decoded."""
    media = [name for name, feature in dataset.features.items() if isinstance(feature, _MEDIA)]
    return dataset.with_format(None).remove_columns(media)


def _prepared(prepare: Callable[[], Result]) -> Result:
    """What `prepare` returns; its own reason if it fails, instead of "an error occurred"."""
    try:
        return prepare()
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Whatever fails inside (the hub, the disk, a broken file) is one line about the source's option."""
    try:
        yield
    except DistillServeError:
        raise
    except PermissionError as error:
        raise DataError(
            f"{source.option} = {source.path}: {error}; where the cache of `datasets` cannot be written, point HF_DATASETS_CACHE at "
            "a folder that can"
        ) from error
    except Exception as error:  # whatever a file system, the hub or a reader of `datasets` raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {source.option} = {source.path}: {reason}{_advice(source, error)}") from error


def _advice(source: Source, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"; rows are kept as Arrow in {datasets.config.HF_DATASETS_CACHE}: make room or point HF_DATASETS_CACHE elsewhere"
    if not os.path.exists(source.path) and _HUB_ID.fullmatch(source.path):
        return "; it is no file or folder here, so it was looked for on the hub"
    return ""


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` among this run's lines, and no line of its log before the one that says the same."""
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
