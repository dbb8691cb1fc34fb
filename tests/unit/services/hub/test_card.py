"""The model card: what the hub reads of it, what people do, and what must not be in it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from services.hub.card import model_card
from services.hub.run_folder import read_records
from tests.hub import metadata_errors
from tests.unit.services.hub.finished_runs import AFTER, BEFORE, finished_run

NASTY = 'a "quoted" | `name`\n# heading <script> $x$ 模型 \u202e hf_abcdefghijklmnopqrstuv'


def card_of(folder: Path, **options: Any) -> str:
    run = finished_run(folder, None, options=options.pop("config", None), **options.pop("run", {}))
    return model_card(read_records(run, options.pop("step", None)), **options)


def metadata(card: str) -> dict[str, Any]:
    assert metadata_errors(card) == []
    return dict(yaml.safe_load(card.split("---\n")[1]))


def toml_in(card: str) -> dict[str, Any]:
    return tomllib.loads(card.split("```toml\n")[1].split("```")[0]) if "```toml" in card else {}


def table_rows(card: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_hub_reads_base_tags_and_results(tmp_path: Path) -> None:
    data = metadata(card_of(tmp_path / "run", repo="me/my-student"))
    assert data["base_model"] == "Qwen/Qwen3-0.6B" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"distillserve", "minillm", "on-policy-distillation"} <= set(data["tags"])
    assert "license" not in data and "datasets" not in data
    (model,) = data["model-index"]
    measured = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert model["name"] == "my-student" and measured == {"exact_match": 0.9, "reverse_kl": 0.015625}


def test_huggingface_hub_reads_the_card_as_well(tmp_path: Path) -> None:
    data = ModelCard(card_of(tmp_path / "run")).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert [result.metric_value for result in data.eval_results or []] == [0.9, 0.015625]


def test_results_are_shown_before_and_after_with_their_standard_errors(tmp_path: Path) -> None:
    rows = table_rows(card_of(tmp_path / "run"))
    # sqrt(0.1 * 0.9 / 100) and sqrt(0.99 * 0.01 / 100), in per cent
    assert rows["exact match, %"] == ["10.0 ± 3.0", "90.0 ± 3.0", "99.0 ± 1.0"]
    assert rows["reverse KL to the teacher, nats a token"] == ["1.2500 ± 0.0500", "0.0156 ± 0.0020", "0"]
    assert rows["held-out prompts"] == ["before", "after step 20", "teacher"]


def test_without_answers_or_errors_what_was_measured_is_shown(tmp_path: Path) -> None:
    one = {"reverse_kl": 0.5, "num_prompts": 1, "num_answers": 0}
    card = card_of(tmp_path / "run", run={"evaluations": {20: one}})
    assert table_rows(card)["reverse KL to the teacher, nats a token"] == ["-", "0.5000", "0"]
    assert "exact match, %" not in card


def test_without_an_evaluation_there_are_no_results(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run", run={"evaluations": {}})
    assert "## Results" not in card and "model-index" not in metadata(card)


def test_a_checkpoint_has_the_results_up_to_its_step(tmp_path: Path) -> None:
    middle = {**AFTER, "exact_match": 0.5}
    card = card_of(tmp_path / "run", run={"evaluations": {0: BEFORE, 10: middle, 20: AFTER}}, step=15)
    rows = table_rows(card)
    assert rows["held-out prompts"][1] == "after step 10" and rows["exact match, %"][1] == "50.0 ± 5.0"
    assert rows["steps"][0].startswith("15 of 20 ")


def test_a_run_that_ended_early_says_so_and_a_complete_one_does_not(tmp_path: Path) -> None:
    early = card_of(tmp_path / "early", run={"steps": 7, "evaluations": {0: BEFORE}})
    assert table_rows(early)["steps"][0].startswith("7 of 20 ")
    assert table_rows(card_of(tmp_path / "done"))["steps"] == ["20"]


def test_options_that_differ_can_be_used_again(tmp_path: Path) -> None:
    config = {
        "loss": {"gamma": 0.5, "advantage_clip": None, "single_step_divergence": "jsd"},
        "data": {"path": "d.jsonl", "chat_template_kwargs": {"enable_thinking": False}},
        "optimizer": {"learning_rate": 2e-6},
        "seed": 3,
    }
    options = toml_in(card_of(tmp_path / "run", config=config))
    assert options["loss"] == {"gamma": 0.5, "single_step_divergence": "jsd"}
    assert options["optimizer"] == {"learning_rate": 2e-6} and options["seed"] == 3
    assert options["data"] == {"chat_template_kwargs": {"enable_thinking": False}}


def test_the_loss_is_described_where_it_is_that_of_the_defaults(tmp_path: Path) -> None:
    loss = table_rows(card_of(tmp_path / "run", config={"loss": {}}))["loss"][0]
    for option in ("rkl_advantage = true", "single_step_decomposition = true", "gamma = 0.0", "kd_temperature = 1.0"):
        assert f"`{option}`" in loss


def test_what_says_where_a_run_ran_is_not_published(tmp_path: Path) -> None:
    config = {
        "student": {"model": "/home/someone/models/base", "model_init_kwargs": {"x": "swordfish"}},
        "teacher": {"model": "/mnt/private/teacher", "engine": "vllm", "engine_args": {"x": "swordfish"}},
        "rollout_client": {"urls": ["http://10.1.2.3:8100"]},
        "data": {"path": "/home/someone/customer-data/train.jsonl", "eval_path": "/home/someone/held.jsonl"},
        "output": {"dir": "/home/someone/runs/x", "project": "secret-project"},
    }
    card = card_of(tmp_path / "run", config=config)
    for word in ("someone", "/home", "/mnt", "private", "customer-data", "10.1.2.3", "swordfish", "secret-project"):
        assert word not in card
    assert str(tmp_path) not in card
    rows = table_rows(card)
    assert (rows["base"], rows["teacher"], rows["data"]) == (["`base`"], ["`teacher`"], ["`train.jsonl`"])
    assert "base_model" not in metadata(card) and "base_model_relation" not in metadata(card)


def test_names_of_any_kind_neither_break_the_card_nor_become_markup(tmp_path: Path) -> None:
    config = {
        "student": {"model": NASTY},
        "teacher": {"model": NASTY},
        "data": {"path": NASTY, "eval_path": NASTY, "prompt_column": NASTY, "chat_template_kwargs": {NASTY: NASTY}},
    }
    card = card_of(tmp_path / "run", config=config, run={"evaluations": {20: AFTER}})
    metadata(card)
    assert "hf_abc" not in card and "\u202e" not in card and "模型" in card
    assert not any(line.startswith("# heading") for line in card.splitlines())
    assert len(table_rows(card)["base"]) == 1  # the pipe is no border
    assert toml_in(card)["data"]["prompt_column"].startswith('a "quoted" | `name` # heading')


@pytest.mark.parametrize(
    "name", ["run", "a b", "x\ny", 'q"', "#1", "模型", "---", "hf_abcdefghijklmnopqrstuv", "a'b: c"]
)
def test_a_folder_of_any_name_gives_a_card(name: str, tmp_path: Path) -> None:
    card = card_of(tmp_path / name)
    metadata(card)
    assert "hf_abc" not in card


def test_a_data_set_of_the_hub_is_named_in_the_metadata(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run", config={"data": {"path": "trl-lib/tldr"}})
    assert metadata(card)["datasets"] == ["trl-lib/tldr"]


def test_an_adapter_is_one_of_its_base(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run", what="adapter", repo="me/a")
    data = metadata(card)
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/a")' in card


def test_an_adapter_of_a_folder_names_its_base_where_it_is_loaded(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run", config={"student": {"model": "/home/me/base"}}, what="adapter", repo="me/a")
    assert 'AutoModelForCausalLM.from_pretrained("base")' in card
    assert 'PeftModel.from_pretrained(base, "me/a")' in card and "base_model" not in metadata(card)


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", '/home/me/a"b', ""])
def test_the_code_that_loads_the_model_is_python(model: str, tmp_path: Path) -> None:
    for index, what in enumerate(("merged", "adapter")):
        card = card_of(tmp_path / f'r"{index}', what=what, config={"student": {"model": model}})
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_named_teachers_are_all_named(tmp_path: Path) -> None:
    named = {"maths": ["http://10.0.0.1:8101"], "code": ["http://10.0.0.2:8101"]}
    config = {"teacher": {}, "teacher_client": {"named": named}}
    assert table_rows(card_of(tmp_path / "run", config=config))["teacher"] == ["`maths`, `code`"]


def test_the_papers_are_cited(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run")
    for reference in ("2306.08543", "2306.13649", "10.64434/tml.20251026"):
        assert reference in card


def test_records_of_another_version_or_with_damage_still_give_a_card(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", None)
    (run / "config.json").write_text(json.dumps({"loss": [1], "data": None, "student": {"model": 3}, "new": {"x": 1}}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '[1]\n{"step": "x"}\n{"step": 21, "eval_reverse_kl": "NaN"}\n{"step": 22, "eval_reverse_kl": NaN}\n{"st'
        )
    metadata(model_card(read_records(run)))
