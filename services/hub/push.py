"""A student of a run that has ended, uploaded to a model hub as one commit: all of it is there, or nothing.

The hub is https://huggingface.co or what HF_ENDPOINT names; the token is that of HF_TOKEN or of `hf auth login`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from services.errors import ConfigError
from services.hub.card import model_card
from services.hub.repository import MAIN, Repository, check_repository
from services.hub.run_folder import What, read_records, weights_folder
from services.hub.upload import Upload, plan_upload, replaced
from services.process.files import cannot_write
from services.process.folder_lock import lock_folder

Dtype = Literal["float32", "bfloat16", "float16"]

_WORKSPACE = ".push"


def push_to_hub(
    run_folder: str | Path,
    repo: str,
    *,
    what: What = "merged",
    step: int | None = None,
    dtype: Dtype | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload a student with its model card, in one commit.

    Args:
        run_folder: output.dir of a run that has ended.
        repo: "owner/name"; created if it is not there.
        what: the whole model, or the adapter of a run with a [lora] section.
        step: of the student in checkpoints/; default: the last one.
        dtype: cast the weights to it on the way; default: as they were saved.
        private: nobody else sees the repository; one that is there and public is refused.
        revision: branch; created from main if it is not there.
        commit_message: default: what was uploaded, and the name of the run's folder.
        on_progress: told in a line what begins.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: there is no such run or student, an option is wrong, or there is no token.
        FolderInUseError: the run has not ended.
        DataError: a file of the run is damaged.
        OutputError: there is no room for the copy in another dtype.
        PeerError: the hub refuses, or cannot be reached.
    """
    run = Path(run_folder)
    with locked_plan(run, repo, what=what, step=step, dtype=dtype, revision=revision) as upload:
        repository = Repository(repo, revision or MAIN)
        repository.prepare(private=private)
        with _cast_files(run, upload, on_progress) as made:
            files = {**upload.files, **made}
            on_progress(f"uploading {len(files)} files, {_shown_size(sum(upload.sizes().values()))}, to {repo}")
            message = commit_message or f"Upload the {_KIND[what]} of {run.resolve().name}"
            return repository.commit(files, replaced(repository.names(), upload), message)


_KIND = {"merged": "student", "adapter": "adapter"}


@contextmanager
def locked_plan(
    run: Path, repo: str, *, what: What, step: int | None, dtype: Dtype | None, revision: str | None
) -> Iterator[Upload]:
    """What a push would upload, from a folder that no run writes into meanwhile.

    Raises:
        ConfigError, FolderInUseError, DataError: as `push_to_hub`.
    """
    check_repository(repo, revision)
    if step is not None and step < 1:
        raise ConfigError(f"--step = {step} must be at least 1")
    weights_folder(run, what, step)  # before the lock, which would make a folder that is not there
    # A folder that cannot be written is no running run's.
    writable = os.access(run, os.W_OK)
    with lock_folder(run, "RUN_FOLDER", "`distillserve push`") if writable else nullcontext():
        card = model_card(read_records(run, step), what, repo, dtype)
        yield plan_upload(weights_folder(run, what, step), what, dtype, card)


@contextmanager
def _cast_files(run: Path, upload: Upload, on_progress: Callable[[str], None]) -> Iterator[dict[str, Path]]:
    """The files of the weights in another dtype, which are gone after the block; none where they stay as they are."""
    if upload.cast is None:
        yield {}
        return
    cast = upload.cast
    with _workspace(run) as folder:
        cast.write(folder, lambda number, count: on_progress(f"casting to {cast.dtype}: file {number} of {count}"))
        yield {path.name: path for path in sorted(folder.iterdir())}


@contextmanager
def _workspace(run: Path) -> Iterator[Path]:
    """An empty folder on the disk of the run, or where temporary files go if that cannot be written."""
    folder = None
    try:
        if os.access(run, os.W_OK):
            folder = run / _WORKSPACE
            shutil.rmtree(folder, ignore_errors=True)  # of a push that was killed
            folder.mkdir()
        else:
            folder = Path(tempfile.mkdtemp(prefix="distillserve-push-"))
    except OSError as error:
        raise cannot_write(run / _WORKSPACE, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
