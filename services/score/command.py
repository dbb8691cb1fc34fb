"""`distillserve score`: a completion as a table, or a whole file into shards.

consumes   the shards of a JSONL file that are not there yet, one after the other
produces   their scores, a safetensors file each, and the manifest after every one
waits for  the teacher servers, a few requests at a time
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from services.clients import TeacherClient
from services.clients.base import all_or_first_error
from services.clients.teacher import LogprobDtype, RefusedSequenceError
from services.clients.teacher_answers import first_replica_problem, join_scores, without_sequences
from services.config.keys import Secrets, reveal
from services.errors import ConfigError, DataError
from services.process.folder_lock import lock_folder
from services.process.streams import writing_stdout
from services.score.rows import InputFile, ShardRows, read_shards_of_rows
from services.score.shards import Manifest, ScoredRow, ScoreSettings, read_shards, resume, write_shard
from services.score.table import describe_totals, render_scores
from services.wire.message import PROTOCOL_VERSION
from services.wire.teacher import TeacherInfo, TeacherScores

__all__ = ["FileOptions", "ScoredRow", "TeacherOptions", "read_shards", "score_file", "score_pair"]

# Sequences of one request: enough to fill a forward pass, few enough for a bar that moves.
_SEQUENCES_PER_REQUEST = 64
# Requests under way at once, for each teacher; each holds the answer of its sequences in memory.
_REQUESTS_IN_FLIGHT = 4
# Rows of a request, more than there can be: the requests are cut here already.
_UNCUT = 1 << 40


@dataclass(frozen=True)
class TeacherOptions:
    """Which teachers are asked, and for what."""

    urls: list[str]
    top_k: int
    temperature: float
    outage_s: float
    timeout_s: float = 300.0


@dataclass(frozen=True)
class FileOptions:
    """What is scored, and where the scores go."""

    input: Path
    output: Path
    logprob_dtype: LogprobDtype
    shard_rows: int
    on_bad_row: Literal["stop", "skip"]


async def score_pair(teacher: TeacherOptions, prompt: str, completion: str) -> None:
    """Print the scores of one completion.

    Raises:
        PeerError: the teacher refuses it, or cannot be reached.
    """
    async with _client(teacher) as client:
        scores = await client.score_text([(prompt, completion)], top_k=teacher.top_k, temperature=teacher.temperature)
        vocabulary = await client.vocabulary()
    console = Console()
    with writing_stdout():
        console.print(render_scores(scores, {index: token for token, index in vocabulary.items()}))
        console.print(describe_totals(scores), markup=False, highlight=False, soft_wrap=True)


async def score_file(teacher: TeacherOptions, options: FileOptions) -> None:
    """Score what is missing of a file's shards, with a progress bar on stderr.

    Raises:
        ConfigError: the folder holds scores of another input or with other settings.
        StartupError: the folder cannot be written, or another process writes into it.
        DataError: a row is bad and they are not to be skipped, or a file cannot be read or written.
        PeerError: no teacher answers.
    """
    input_file, num_lines = await asyncio.to_thread(InputFile.of, options.input)
    with lock_folder(options.output, "--output", "`distillserve score`"):
        await _score_file(teacher, options, input_file, num_lines)


async def _score_file(teacher: TeacherOptions, options: FileOptions, input_file: InputFile, num_lines: int) -> None:
    async with _client(teacher) as client:
        info = await _agreed_info(client)
        settings = ScoreSettings(
            protocol=PROTOCOL_VERSION,
            teacher=info.model,
            fingerprint=info.fingerprint,
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            temperature=teacher.temperature,
            top_k=teacher.top_k,
            logprob_dtype=options.logprob_dtype,
            shard_rows=options.shard_rows,
            input=input_file,
        )
        manifest = resume(options.output, settings, num_lines)
        with _progress() as progress:
            task = progress.add_task(options.input.name, total=num_lines)
            for index in manifest.shards:
                progress.advance(task, _num_lines(manifest, index))
            scorer = _FileScorer(client, options, manifest, lambda lines: progress.advance(task, lines))
            await scorer.score_missing_shards()
    Console(stderr=True).print(_summary(options, manifest), highlight=False, soft_wrap=True)


class _FileScorer:
    """Scores the missing shards of one file.

    Args:
        on_lines: told how many lines of the input are done since.
    """

    def __init__(
        self, client: TeacherClient, options: FileOptions, manifest: Manifest, on_lines: Callable[[int], None]
    ) -> None:
        self._client, self._options, self._manifest, self._on_lines = client, options, manifest, on_lines
        self._room = asyncio.Semaphore(_REQUESTS_IN_FLIGHT * len(client.urls))

    async def score_missing_shards(self) -> None:
        for row, reason in self._manifest.bad_rows.items():
            self._refuse_bad_row(row, reason)  # skipped by an earlier run, and not to be skipped any more
        shards = read_shards_of_rows(
            self._options.input, self._manifest.settings.shard_rows, frozenset(self._manifest.shards)
        )
        for shard in shards:
            for row, reason in shard.bad_rows.items():
                self._refuse_bad_row(row, reason)
            await self._score_shard(shard)

    async def _score_shard(self, shard: ShardRows) -> None:
        self._on_lines(shard.num_lines - len(shard.rows))
        starts = range(0, len(shard.rows), _SEQUENCES_PER_REQUEST)
        answers = await all_or_first_error([self._score_part(shard, start) for start in starts])
        refused = [index for index, row in enumerate(shard.rows) if row in shard.bad_rows]
        kept = [row for row in shard.rows if row not in shard.bad_rows]
        scores = without_sequences(join_scores(answers, len(shard.rows)), refused) if kept else None
        self._manifest.shards[shard.index] = await asyncio.to_thread(
            write_shard, self._options.output, shard.index, shard.first_row, kept, scores
        )
        self._manifest.bad_rows.update(shard.bad_rows)
        self._manifest.write(self._options.output)

    async def _score_part(self, shard: ShardRows, start: int) -> tuple[list[int], TeacherScores]:
        """Indices in the shard of one request's worth of it, and their scores; what the teacher refuses has no rows."""
        indices = list(range(start, min(start + _SEQUENCES_PER_REQUEST, len(shard.rows))))
        settings = self._manifest.settings

        def refuse(index: int, error: RefusedSequenceError) -> None:
            row = shard.rows[indices[index]]
            self._refuse_bad_row(row, error.reason)
            shard.bad_rows[row] = error.reason

        async with self._room:
            scores = await self._client.score_sequences(
                [shard.sequences[index] for index in indices],
                top_k=settings.top_k,
                temperature=settings.temperature,
                logprob_dtype=self._options.logprob_dtype,
                max_rows_per_request=_UNCUT,
                on_refused=refuse,
            )
        self._on_lines(len(indices))
        return indices, scores

    def _refuse_bad_row(self, row: int, reason: str) -> None:
        if self._options.on_bad_row == "stop":
            raise DataError(f"{self._options.input}, row {row}: {reason}; fix the row or pass --on-bad-row skip")


@asynccontextmanager
async def _client(teacher: TeacherOptions) -> AsyncIterator[TeacherClient]:
    key = reveal(Secrets().teacher_key)
    async with TeacherClient(teacher.urls, key=key, timeout_s=teacher.timeout_s, outage_s=teacher.outage_s) as client:
        yield client


async def _agreed_info(client: TeacherClient) -> TeacherInfo:
    infos = await client.info()
    if (problem := first_replica_problem(client.urls, infos)) is not None:
        raise ConfigError(f"{problem}; give replicas of one")
    return infos[0]


def _num_lines(manifest: Manifest, index: int) -> int:
    size = manifest.settings.shard_rows
    return min(size, manifest.num_lines - index * size)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def _summary(options: FileOptions, manifest: Manifest) -> str:
    shards = manifest.shards.values()
    sequences, tokens = sum(s.num_sequences for s in shards), sum(s.num_rows for s in shards)
    skipped = f", {len(manifest.bad_rows)} bad rows skipped" if manifest.bad_rows else ""
    return f"{options.output}: {len(shards)} shards, {sequences} sequences, {tokens} scored tokens{skipped}"
