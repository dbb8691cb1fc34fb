"""Data sets of the hub, as a process reads them whose HF_ENDPOINT is a hub on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.unit.trainer.data.dataset_hub import dataset_hub

READ = """
import json, sys
from services.config import DataConfig
from services.errors import DataError
from trainer.data.training_rows import read_rows
from trainer.tiny.pair import build_tokenizer
try:
    rows, held_out = read_rows(DataConfig(**json.loads(sys.argv[1])), build_tokenizer(), seed=0)
    found = [[[p.row, p.text, p.answer, p.columns] for p in part.prompts] for part in (rows.parts[0], held_out)]
    print(json.dumps(found))
except DataError as error:
    print(json.dumps(str(error)))
"""


def read(endpoint: str, home: Path, **options: Any) -> Any:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(Path.cwd())}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", READ, json.dumps({"path": "someone/rows", "eval_split": "test", **options})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


TRAIN, TEST = [{"prompt": "é", "answer": "007"}, {"prompt": "b", "answer": None}], [{"prompt": "t", "answer": "1"}]
FILES = {
    "csv": {"train.csv": "prompt,answer\né,007\nb,\n".encode(), "test.csv": b"prompt,answer\nt,1\n"},
    "jsonl": {
        f"data/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in (("train", TRAIN), ("test", TEST))
    },
    "parquet": {
        f"data/{name}-00000-of-00001.parquet": parquet(rows) for name, rows in (("train", TRAIN), ("test", TEST))
    },
}


@pytest.mark.parametrize("form", FILES)
def test_a_data_set_of_the_hub_is_read_as_files_here_are(form: str, tmp_path: Path) -> None:
    with dataset_hub("someone/rows", {"README.md": b"---\n---\n", **FILES[form]}) as endpoint:
        trained, held_out = read(endpoint, tmp_path)
    first = 2 if form == "csv" else 1
    assert trained == [[first, "é", "007", {}], [first + 1, "b", None, {}]]
    assert held_out == [[first, "t", "1", {}]]


def test_a_bad_row_of_the_hub_is_named_by_data_set_file_and_row(tmp_path: Path) -> None:
    files = {"data/train.jsonl": b'{"prompt": "a"}\n{"prompt": ""}\n', "data/test.jsonl": b'{"prompt": "a"}\n'}
    with dataset_hub("someone/rows", files) as endpoint:
        said = read(endpoint, tmp_path)
    assert said.startswith("someone/rows/data/train.jsonl, row 2: `prompt` must be non-empty text")


def test_a_data_set_that_the_hub_does_not_have_is_one_line(tmp_path: Path) -> None:
    with dataset_hub("someone/else", {}) as endpoint:
        said = read(endpoint, tmp_path)
    assert said.startswith("cannot read data.path = someone/rows: ") and "\n" not in said
