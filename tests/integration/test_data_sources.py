"""A run whose rows come from Parquet and CSV, mixed, filtered, held out, and tokenised when their turn comes."""

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.integration.processes import command, environment
from tests.models import save_model

pytestmark = pytest.mark.integration


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_on_mixed_sources_evaluates_on_what_it_holds_out(tmp_path: Path, models: dict[str, str]) -> None:
    sums = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i:03}", "level": i % 2} for i in range(60)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(sums), tmp_path / "sums.parquet")
    (tmp_path / "more.csv").write_text("prompt,answer,level\n" + "".join(f"{i}-1=,{i - 1:03},1\n" for i in range(1, 9)))
    output = tmp_path / "out"
    arguments = [
        *("--student.model", models["qwen3"], "--teacher.model", save_model(tmp_path / "teacher", "qwen3", seed=7)),
        *("--data.path", str(tmp_path / "sums.parquet"), "--data.held_out", "6", "--data.tokenize_at_start", "4"),
        *("--data.more_paths", json.dumps({str(tmp_path / "more.csv"): 1}), "--data.filters", 'level={"min": 1}'),
        *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8", "--pipeline.epochs", "1"),
        *("--pipeline.prompts_per_step", "8", "--optimizer.learning_rate", "1e-3", "--output.dir", str(output)),
    ]
    surroundings = {**environment(), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command("up", *arguments), env=surroundings, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "num_steps" in row] == [1, 2, 3, 4]  # 24 of sums and 8 of more
    assert json.loads((output / "summary.json").read_text())["after"]["num_prompts"] == 6
