"""What is trained on, what is held out, and in which order."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from services.config import DataConfig
from services.errors import ConfigError, DataError
from trainer.data.prompts import first_prompts, read_prompts
from trainer.data.stream import MIXING_BLOCK, IteratedStream, MixedStream, RowStream, _apportion
from trainer.data.training_rows import read_rows
from trainer.tiny.pair import build_tokenizer

TOKENIZER = build_tokenizer()


def write(path: Path, texts: list[str], **columns: Any) -> str:
    path.write_text("".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts))
    return str(path)


def read(seed: int = 0, **options: Any) -> Any:
    return read_rows(DataConfig(**options), TOKENIZER, seed=seed)


def texts(prompts: Any) -> list[str]:
    return [prompt.text for prompt in prompts]


def names(count: int, letter: str = "p") -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


@pytest.mark.parametrize(("share", "count"), [(3, 3), (0.25, 5), (0.001, 1), (1, 1)])
def test_held_out_rows_are_not_trained_on(share: float, count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", names(20))
    rows, held_out = read(path=path, held_out=share)
    trained = texts(rows.parts[0].prompts)
    assert len(held_out.prompts) == count
    assert sorted([*trained, *texts(held_out.prompts)]) == sorted(names(20))


def test_what_is_held_out_follows_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", names(50))
    first, same, other = (texts(read(seed, path=path, held_out=9)[1].prompts) for seed in (1, 1, 2))
    assert first == same != other


def test_a_held_out_prompt_is_nowhere_trained_on_however_often_it_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", names(10) * 3)
    more = write(tmp_path / "more.jsonl", [*names(10), "other"], answer="another")
    rows, held_out = read(path=path, held_out=4, more_paths={more: 1})
    kept = {*texts(held_out.prompts)}
    assert len(kept) == len(held_out.prompts) == 4
    assert [sorted(texts(part.prompts)) for part in rows.parts] == [
        sorted([name for name in names(10) if name not in kept] * 3),
        sorted({*names(10), "other"} - kept),
    ]


@pytest.mark.parametrize("share", [5, 10, 0.95])
def test_holding_out_everything_is_refused(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", names(5) * 2)
    with pytest.raises(DataError, match=r"data\.held_out = .* leaves nothing to train on: it has 5 different prompts"):
        read(path=path, held_out=share)


def test_another_split_of_the_source_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", names(3))
    write(tmp_path / "rows" / "test.jsonl", names(2, "t"))
    rows, held_out = read(path=str(tmp_path / "rows"), eval_split="test")
    assert texts(rows.parts[0].prompts) == names(3) and texts(held_out.prompts) == names(2, "t")
    rows, held_out = read(
        path=str(tmp_path / "rows"), split="test", eval_path=str(tmp_path / "rows"), eval_split="train"
    )
    assert texts(rows.parts[0].prompts) == names(2, "t") and texts(held_out.prompts) == names(3)


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", names(5, "a"))
    more = {write(tmp_path / "b.jsonl", names(4, "b")): 0.5, write(tmp_path / "c.jsonl", names(3, "c")): 2.5}
    prompts = read(path=path, more_paths=more)[0].fitting(99)
    assert len(prompts) == 12
    taken = texts(prompts.stream(seed=0, shuffle=True).take(MIXING_BLOCK))
    count = Counter(text[0] for text in taken)
    assert [count[name] / MIXING_BLOCK for name in "abc"] == pytest.approx([0.25, 0.125, 0.625], abs=2 / MIXING_BLOCK)
    for start in range(0, MIXING_BLOCK - 16, 16):  # in every step, too
        assert 3 <= sum(text[0] == "a" for text in taken[start : start + 16]) <= 5
    of_a = [text for text in taken if text[0] == "a"]
    assert [sorted(of_a[i : i + 5]) for i in range(0, 20, 5)] == [names(5, "a")] * 4


def test_each_source_goes_on_from_block_to_block_where_it_was() -> None:
    parts = [RowStream([(source, row) for row in range(7)], seed=0, shuffle=False) for source in range(3)]
    taken = MixedStream(parts, [1, 0.3, 2]).take(3 * MIXING_BLOCK)
    for source in range(3):
        own = [row for of, row in taken if of == source]
        assert own == [turn % 7 for turn in range(len(own))]


def test_rows_that_come_one_after_another_are_read_once() -> None:
    opened: list[int] = []

    def read_from(position: int) -> Iterator[int]:
        opened.append(position)
        return iter(range(position, 100))

    stream = IteratedStream(read_from)
    assert [*stream.take(3), *stream.take(4)] == [*range(7)] and opened == [0]
    stream.position = 50
    assert stream.take(2) == [50, 51] and opened == [0, 50]


def test_the_teachers_of_all_sources_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["p"], teacher="maths")
    more = write(tmp_path / "b.jsonl", ["p"], teacher="code")
    config = DataConfig(path=path, more_paths={more: 1})
    assert read_rows(config, TOKENIZER, seed=0, teachers=["maths", "code"])[0].teachers == {"maths", "code"}


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_every_source_has_its_part_of_a_block(weights: list[float]) -> None:
    counts = _apportion(weights, MIXING_BLOCK)
    assert sum(counts) == MIXING_BLOCK and min(counts) >= 1
    assert all(counts[i] <= counts[j] + 1 for i, a in enumerate(weights) for j, b in enumerate(weights) if a <= b)


def stream_of(kind: str, seed: int) -> RowStream[int]:
    """A stream with rows that are left out."""
    rows = [[None if number % 4 == 3 else 100 * part + number for number in range(5 + part)] for part in range(3)]
    if kind == "iterated":
        return IteratedStream(lambda position: islice((row for _ in iter(int, 1) for row in rows[0]), position, None))
    streams = [RowStream(part, seed=seed, shuffle=kind != "in order") for part in rows]
    return MixedStream(streams, [1, 0.3, 2]) if kind == "mixed" else streams[1]


@settings(deadline=None)
@given(
    st.sampled_from(["one", "in order", "mixed", "iterated"]),
    st.integers(0, 3000),
    st.integers(0, 5),
    st.integers(1, 40),
)
def test_a_stream_goes_on_from_any_position_as_if_uninterrupted(
    kind: str, position: int, seed: int, count: int
) -> None:
    whole, resumed = stream_of(kind, seed), stream_of(kind, seed)
    while whole.position < position:
        whole.take(1)
    resumed.position = whole.position
    assert resumed.take(count) == whole.take(count) and resumed.position == whole.position


@pytest.mark.parametrize("kind", ["one", "mixed"])
def test_the_way_a_stream_is_cut_changes_nothing(kind: str) -> None:
    whole, cut, rng = stream_of(kind, 1), stream_of(kind, 1), random.Random(0)
    sizes = [rng.randint(0, 9) for _ in range(300)]
    assert whole.take(sum(sizes)) == [row for size in sizes for row in cut.take(size)]


def test_a_source_of_which_nothing_can_be_used_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IteratedStream, "period", 7)  # a million rows take a second
    of_none = [RowStream[int]([None] * 7, seed=0, shuffle=True), IteratedStream[int](lambda _: iter(lambda: None, 0))]
    for stream in of_none:
        with pytest.raises(DataError, match="none of 7 rows of the data can be used"):
            stream.take(1)
    nothing_in_one = MixedStream([of_none[0], RowStream([1], seed=0, shuffle=True)], [1, 1])
    assert nothing_in_one.take(3) == [1, 1, 1]


def test_an_object_is_trained_on_and_another_one_held_out() -> None:
    data = Dataset.from_list([{"prompt": name} for name in names(4)])
    rows, held_out = read_rows(DataConfig(), TOKENIZER, seed=0, train_dataset=data, eval_dataset=data.select([0]))
    assert texts(rows.parts[0].prompts) == names(4) and texts(held_out.prompts) == ["p0"]  # type: ignore[union-attr]
    rows, held_out = read_rows(DataConfig(held_out=1), TOKENIZER, seed=0, train_dataset=data)
    assert sorted([*texts(rows.parts[0].prompts), *texts(held_out.prompts)]) == names(4)  # type: ignore[union-attr]


def test_rows_to_evaluate_on_have_a_number() -> None:
    with pytest.raises(DataError, match=r"eval_dataset is a IterableDataset; give a datasets\.Dataset$"):
        data = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
        read_rows(
            DataConfig(), TOKENIZER, seed=0, train_dataset=data, eval_dataset=iterable({"prompt": "a"}, {"prompt": "b"})
        )  # type: ignore[arg-type]


def iterable(*rows: dict[str, Any]) -> IterableDataset:
    return Dataset.from_list([*rows]).to_iterable_dataset(num_shards=2)


def test_an_iterable_is_read_as_it_comes_epoch_after_epoch() -> None:
    rows, _ = read_rows(
        DataConfig(), TOKENIZER, seed=0, train_dataset=iterable(*({"prompt": name} for name in names(5)))
    )
    prompts = rows.fitting(99)
    assert texts(prompts.first(2)) == ["p0", "p1"]
    stream, resumed = (prompts.stream(seed=0, shuffle=True) for _ in range(2))
    assert texts(stream.take(12)) == [*names(5), *names(5), "p0", "p1"]
    assert stream.position == 12
    resumed.position = 7
    assert texts(resumed.take(5)) == ["p2", "p3", "p4", "p0", "p1"]
    with pytest.raises(ConfigError, match=r"pipeline\.epochs needs the number of rows.*; give pipeline\.steps"):
        len(prompts)


def test_the_beginning_of_a_stream_goes_on_as_a_longer_one_would() -> None:
    """Of a longer run the file is longer."""
    short, long = (
        read_rows(
            DataConfig(), TOKENIZER, seed=0, train_dataset=Dataset.from_list([{"prompt": n} for n in names(count)])
        )[0]
        for count in (24, 32)
    )
    before, after = (rows.fitting(99, is_stream=True) for rows in (short, long))
    assert before.fingerprints() == after.fingerprints() and short.fitting(99).fingerprints() != before.fingerprints()
    stream, longer = (rows.stream(seed=0, shuffle=True) for rows in (before, after))
    used = texts(stream.take(12))
    longer.position = stream.position
    assert used + texts(longer.take(20)) == names(32)
    assert texts(short.fitting(99).stream(seed=0, shuffle=True).take(12)) != used


def test_an_iterable_is_shuffled_anew_in_every_epoch_and_resumes_in_its_order() -> None:
    data = iterable(*({"prompt": name} for name in names(30))).shuffle(seed=1, buffer_size=30)
    prompts = read_rows(DataConfig(), TOKENIZER, seed=0, train_dataset=data)[0].fitting(99)
    stream, resumed = (prompts.stream(seed=0, shuffle=True) for _ in range(2))
    taken = texts(stream.take(90))
    epochs = [taken[i : i + 30] for i in (0, 30, 60)]
    assert all(sorted(epoch) == sorted(names(30)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    resumed.position = 41
    assert texts(resumed.take(40)) == taken[41:81]


def test_rows_of_an_iterable_are_filtered_skipped_and_bad_as_others(caplog: pytest.LogCaptureFixture) -> None:
    data = iterable(
        {"prompt": "a", "n": 1}, {"prompt": "", "n": 1}, {"prompt": "toolong", "n": 1}, {"prompt": "d", "n": 2}
    )
    skipping = DataConfig(on_bad_row="skip", filters={"n": 1})
    prompts = read_prompts(data, skipping, TOKENIZER, option="train_dataset").fitting(5)
    assert texts(IteratedStream(prompts.from_position).take(3)) == ["a", "a", "a"]  # type: ignore[union-attr]
    assert "train_dataset: skipped 1 rows so far, the last one: train_dataset, row 2: `prompt` must be" in caplog.text
    with pytest.raises(DataError, match=r"train_dataset, row 2: `prompt` must be .*; fix the row"):
        first_prompts(read_prompts(data, DataConfig(), TOKENIZER, option="train_dataset").fitting(5), 9)


def test_an_iterable_without_rows_is_refused() -> None:
    data = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(DataError, match="train_dataset holds no row"):
        first_prompts(read_prompts(data, DataConfig(), TOKENIZER, option="train_dataset").fitting(5), 1)


def test_nothing_is_held_out_of_an_iterable() -> None:
    with pytest.raises(DataError, match=r"data\.held_out takes rows of a source that has a number of rows"):
        read_rows(DataConfig(held_out=1), TOKENIZER, seed=0, train_dataset=iterable({"prompt": "a"}, {"prompt": "b"}))
