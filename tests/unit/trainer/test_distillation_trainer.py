"""`DistillationTrainer`: what becomes of its arguments, which of its two forms it takes, and what it leaves behind."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from services.config import RunConfig
from services.errors import ConfigError, DataError, FolderInUseError, PeerError
from services.gpus.advice import updated
from services.process.folder_lock import lock_folder
from services.process.signals import Interrupted
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.trainer.runs import opener, run_config
from trainer import Callback, DistillationTrainer
from trainer import distillation_trainer as module
from trainer import measure as measuring
from trainer import train as training
from trainer.output.report import Summary
from trainer.user_objects import UserObjects

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4", "topic": "sums"}]
SUMMARY = Summary(None, None, 3, 1.0, 10)


class Servers:
    """Stands for StartedServers."""

    def __init__(self, config: RunConfig) -> None:
        self.config = updated(config, "rollout_client", urls=["http://127.0.0.1:9"])
        self.error: PeerError | None = None

    def tell(self, fail: Any) -> None: ...

    def lost(self) -> PeerError | None:
        return self.error


class World:
    """What the trainer asked for in the place of servers and a run."""

    def __init__(self) -> None:
        self.started: list[Servers] = []
        self.trained: list[tuple[RunConfig, UserObjects]] = []
        self.num_running = 0
        self.act = lambda: None

    @contextmanager
    def started_servers(self, config: RunConfig, screen: Any, environment: Any) -> Iterator[Servers]:
        self.started.append(Servers(config))
        self.num_running += 1
        try:
            yield self.started[-1]
        finally:
            self.num_running -= 1

    def train(self, config: RunConfig, objects: UserObjects) -> Summary:
        self.trained.append((config, objects))
        objects.begun()
        self.act()
        return SUMMARY


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "started_servers", world.started_servers)
    monkeypatch.setattr(module, "train", world.train)
    return world


def config_in(folder: Path, **sections: Any) -> RunConfig:
    return RunConfig(output={"dir": str(folder / "out")}, **sections)


@pytest.fixture
def models(tiny_model_folder: Any) -> dict[str, str]:
    return {"student": tiny_model_folder("llama"), "teacher": tiny_model_folder("qwen3")}


def test_the_page_s_own_lines_start_servers_and_make_one_pass_over_the_data(
    world: World, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = datasets.Dataset.from_list(ROWS[:1] * 2)
    summary = DistillationTrainer(**models, train_dataset=dataset).train()  # type: ignore[arg-type]
    assert summary is SUMMARY and world.num_running == 0
    ((config, _),) = world.trained
    assert (config.student.model, config.teacher.model) == (models["student"], models["teacher"])
    assert (config.pipeline.epochs, config.pipeline.steps) == (1.0, None)
    assert config.rollout_client.urls == ["http://127.0.0.1:9"]  # the one that the servers have
    assert datasets.load_from_disk(config.data.path or "").to_list() == ROWS[:1] * 2
    assert Path(config.data.path or "").is_relative_to("outputs/run")


def test_with_urls_it_attaches(world: World, models: dict[str, str], tmp_path: Path) -> None:
    urls = {"rollout_client": {"urls": ["http://a:1"]}, "teacher_client": {"urls": ["http://b:2"]}}
    config = config_in(tmp_path, student={"model": models["student"]}, pipeline={"steps": 4}, **urls)
    DistillationTrainer(config, train_dataset=ROWS).train()
    ((found, _),) = world.trained
    assert world.started == [] and found.rollout_client.urls == ["http://a:1"] and found.pipeline.epochs is None


def test_what_a_run_goes_on_from_is_said_as_transformers_does(
    world: World, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RunConfig] = []
    monkeypatch.setattr(DistillationTrainer, "_run", lambda self, work, config, objects: given.append(config))
    trainer = DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS)  # type: ignore[arg-type]
    checkpoint = tmp_path / "out" / "checkpoints" / "step-20"
    for asked in (None, False, True, checkpoint, f"{checkpoint}/"):
        trainer.train(resume_from_checkpoint=asked)
    found = [(config.output.resume, config.output.resume_step) for config in given]
    assert found == [(False, None), (False, None), (True, None), (False, 20), (False, 20)]
    for wrong in (tmp_path / "elsewhere" / "step-20", checkpoint / "resume", checkpoint.with_name("best")):
        with pytest.raises(ConfigError, match="is no checkpoint of this run"):
            trainer.train(resume_from_checkpoint=wrong)
    trainer.config = updated(trainer.config, "output", overwrite=True)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint = 'True' and config\.output\.overwrite = True"):
        trainer.train(resume_from_checkpoint=True)


def test_models_that_are_objects_are_saved_into_the_run_s_folder_with_their_tokenizers(
    world: World, models: dict[str, str], tmp_path: Path
) -> None:
    objects = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in models.items()}
    with torch.no_grad():
        objects["student"].lm_head.weight.fill_(0.25)
    DistillationTrainer(config_in(tmp_path), **objects, train_dataset=ROWS).train()
    ((config, _),) = world.trained
    assert config.student.model == str(tmp_path / "out" / "models" / "student")
    loaded = AutoModelForCausalLM.from_pretrained(config.student.model)
    assert loaded.lm_head.weight.unique().tolist() == [0.25]
    vocabulary = AutoTokenizer.from_pretrained(models["student"]).get_vocab()
    assert AutoTokenizer.from_pretrained(config.student.model).get_vocab() == vocabulary
    assert AutoModelForCausalLM.from_pretrained(config.teacher.model).config.model_type == "qwen3"


def test_of_a_stream_as_many_rows_are_taken_as_the_run_uses(
    world: World, models: dict[str, str], tmp_path: Path
) -> None:
    def endless() -> Iterator[dict[str, str]]:
        number = 0
        while True:
            yield {"prompt": f"{number}+1="}
            number += 1

    config = config_in(
        tmp_path, pipeline={"steps": 3, "prompts_per_step": 4}, evaluation={"num_prompts": 5}, **_MODELS(models)
    )
    stream = datasets.IterableDataset.from_generator(endless)
    DistillationTrainer(config, train_dataset=stream, eval_dataset=endless()).train()
    ((found, _),) = world.trained
    assert len(Path(found.data.path or "").read_text().splitlines()) == 12
    assert len(Path(found.data.eval_path or "").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("rows", "sections", "is_stream"),
    [
        (ROWS, {}, False),
        (datasets.Dataset.from_list(ROWS), {}, False),
        (iter(ROWS), {}, True),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), {}, True),
        (iter(ROWS), {"data": {"held_out": 1}}, False),
        (iter(ROWS), {"pipeline": {"steps": None, "epochs": 2}}, False),
    ],
)
def test_rows_of_which_a_longer_run_has_more_are_told_from_others(
    rows: Any, sections: Any, is_stream: bool, world: World, models: dict[str, str], tmp_path: Path
) -> None:
    config = config_in(tmp_path, **{"pipeline": {"steps": 3}, **_MODELS(models), **sections})
    DistillationTrainer(config, train_dataset=rows).train()
    ((_, objects),) = world.trained
    assert objects.is_stream == is_stream


def _MODELS(models: dict[str, str]) -> dict[str, Any]:
    return {name: {"model": folder} for name, folder in models.items()}


class Printing(TrainerCallback):
    pass


def test_objects_reach_the_run(world: World, models: dict[str, str], tmp_path: Path) -> None:
    async def function(*_: Any) -> Any: ...

    callback = Callback()
    DistillationTrainer(
        config_in(tmp_path),
        **models,  # type: ignore[arg-type]
        train_dataset=ROWS,
        callbacks=[callback, Printing()],
        optimizers=(torch.optim.SGD, None),
        rollout_function=function,
        rollout_timeout_s=5.0,
    ).train()
    ((_, objects),) = world.trained
    assert objects.callbacks[0] is callback and len(objects.callbacks) == 2
    assert objects.optimizers.optimizer is torch.optim.SGD and objects.optimizers.schedule is None
    assert objects.rollout_function is function and objects.rollout_timeout_s == 5.0


URLS = {"rollout_client": {"urls": ["http://a:1"]}}


@pytest.mark.parametrize(
    ("sections", "arguments", "message"),
    [
        ({"student": {"model": "a"}}, {"student": "b"}, r"student = 'b' and config\.student\.model = 'a' contradict"),
        ({"data": {"path": "a"}}, {"train_dataset": ROWS}, r"train_dataset = a list and config\.data\.path = 'a'"),
        ({}, {"callbacks": [Callback]}, r"callbacks\[0\] = Callback is a class"),
        ({}, {"optimizers": torch.optim.SGD}, "optimizers is a pair"),
        ({}, {"optimizers": ("sgd", None)}, r"optimizers\[0\] is a str"),
        ({}, {"rollout_function": 3}, "rollout_function is a int"),
        ({}, {"rollout_function": print, "rollout_timeout_s": 0}, "rollout_timeout_s = 0 must be above 0"),
        ({}, {"rollout_function": print, "rollout_timeout_s": float("nan")}, "rollout_timeout_s = nan must be"),
        (
            {"loss": {"support": "student_topk"}, "rollout": {"max_logprobs": 100}},
            {"rollout_function": print},
            r"loss\.support = student_topk",
        ),
        (URLS, {"teacher": torch.nn.Linear(1, 1)}, "teacher is an object, but config.rollout_client.urls"),
        ({}, {"processing_class": object()}, "processing_class belongs to the student"),
        (
            {"reward": {"functions": ["a:b"]}, "pipeline": {"samples_per_prompt": 2}},
            {"reward_functions": ["c:d"]},
            "are both given",
        ),
    ],
)
def test_what_contradicts_is_refused_when_it_is_said(
    sections: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer(config_in(tmp_path, **sections), **arguments)


def a_reward(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize("given", [a_reward, [a_reward], (a_reward,)])
def test_reward_functions_reach_the_run_by_name(
    given: Any, world: World, models: dict[str, str], tmp_path: Path
) -> None:
    config = config_in(tmp_path, pipeline={"samples_per_prompt": 2})
    DistillationTrainer(config, **models, train_dataset=ROWS, reward_functions=given).train()  # type: ignore[arg-type]
    ((found, _),) = world.trained
    assert found.reward.functions == [f"{__name__}:a_reward"]


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config is a str; give a trainer\.RunConfig, or student="):
        DistillationTrainer("Qwen/Qwen3-0.6B")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sections", "arguments", "error", "message"),
    [
        ({}, {"teacher": "a"}, ConfigError, r"student\.model is required"),
        ({}, {"student": "a"}, ConfigError, r"teacher\.model is required"),
        ({}, {"student": "a", "teacher": "b"}, ConfigError, r"data\.path is required"),
        (
            {"teacher_client": {"urls": ["http://b:2"]}},
            {"student": "a", "train_dataset": ROWS},
            ConfigError,
            "teacher_client names servers that run, rollout_client.urls does not",
        ),
        (
            {"evaluation": {"every_steps": 2}},
            {"student": "a", "teacher": "b", "train_dataset": ROWS},
            ConfigError,
            "eval_path",
        ),
        (
            {},
            {"student": "a", "teacher": "b", "train_dataset": {"train": ROWS}},
            DataError,
            r"choose one, e\.g\. dataset",
        ),
        ({"trainer": {"num_processes": 2}}, {"student": "a"}, ConfigError, "torchrun --nproc-per-node 2 PROGRAM"),
    ],
)
def test_what_a_run_lacks_is_named_before_a_server_is_started(
    sections: dict[str, Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    world: World,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        DistillationTrainer(config_in(tmp_path, **sections), **arguments).train()
    assert world.started == [] and world.trained == []


def test_a_folder_that_another_run_uses_is_not_written_to(world: World, models: dict[str, str], tmp_path: Path) -> None:
    code = "import sys, time\nfrom pathlib import Path\nfrom services.process.folder_lock import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1]), 'output.dir', 'another'):\n    print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(FolderInUseError, match="in use by another"):
            DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).train()  # type: ignore[arg-type]
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out" / "data").exists() and world.started == []


def test_what_a_run_changes_in_its_process_is_put_back(world: World, models: dict[str, str], tmp_path: Path) -> None:
    before = (
        dict(os.environ),
        [(logging.getLogger(n).level, logging.getLogger(n).handlers[:]) for n in ("services", "trainer")],
    )

    def fail() -> None:
        assert logging.getLogger("trainer.x").isEnabledFor(logging.INFO)
        raise ValueError

    world.act = fail
    with pytest.raises(ValueError):
        DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).train()  # type: ignore[arg-type]
    os.environ.pop("CUDA_DEVICE_ORDER", None)
    before[0].pop("CUDA_DEVICE_ORDER", None)
    after = (
        dict(os.environ),
        [(logging.getLogger(n).level, logging.getLogger(n).handlers) for n in ("services", "trainer")],
    )
    assert after == before and world.num_running == 0
    with lock_folder(tmp_path / "out", "output.dir", "the next one"):
        pass


def test_what_the_trainer_says_is_in_its_log_and_progress_is_shown(
    world: World, models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def say() -> None:
        logging.getLogger("trainer.output.progress").info("step 1/3")
        logging.getLogger("trainer.learner").info("of no interest")
        logging.getLogger("trainer.learner").warning("skipped")

    world.act = say
    DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).train()  # type: ignore[arg-type]
    shown = capfd.readouterr().out
    assert "trainer | step 1/3" in shown and "trainer | warning: skipped" in shown and "of no interest" not in shown
    log = (tmp_path / "out" / "logs" / "trainer.log").read_text()
    assert all(text in log for text in ("step 1/3", "of no interest", "skipped"))


def test_a_server_that_is_lost_is_the_reason_of_what_fails_for_want_of_it(
    world: World, models: dict[str, str], tmp_path: Path
) -> None:
    def fail() -> None:
        world.started[0].error = PeerError("the teacher was ended by SIGKILL")
        raise PeerError("connection refused")

    world.act = fail
    with pytest.raises(PeerError, match="the teacher was ended by SIGKILL") as caught:
        DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).train()  # type: ignore[arg-type]
    assert str(caught.value.__cause__) == "connection refused"


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [(signal.SIGINT, KeyboardInterrupt, "^ended by SIGINT$"), (signal.SIGTERM, SystemExit, "^143$")],
)
def test_a_signal_ends_a_program_as_python_does(
    number: int, error: type[BaseException], said: str, world: World, models: dict[str, str], tmp_path: Path
) -> None:
    def interrupt() -> None:
        raise Interrupted(number)

    world.act = interrupt
    with pytest.raises(error, match=said) as caught:
        DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).train()  # type: ignore[arg-type]
    assert type(caught.value) is error and world.num_running == 0


def test_another_rank_starts_nothing_and_writes_nothing(
    world: World, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {**models, "train_dataset": ROWS, "optimizers": (torch.optim.SGD, None)}
    trainer = DistillationTrainer(config_in(tmp_path), **given)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(tmp_path / "copy")
    ((_, objects),) = world.trained
    assert objects.optimizers.optimizer is torch.optim.SGD
    assert world.started == [] and list(tmp_path.iterdir()) == []


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


@pytest.fixture
def attached(
    teacher: ScriptedTeacher, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DistillationTrainer:
    """A trainer whose runs are real but for the rollout servers."""
    for where in (training, measuring):
        monkeypatch.setattr(where, "open_session", opener(teacher, lambda session: None))
    config = run_config(models["student"], tmp_path / "out")
    config = RunConfig(**{**config.model_dump(), "rollout_client": {"urls": ["http://a:1"]}})
    return DistillationTrainer(config, train_dataset=ROWS, eval_dataset=ROWS)


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_trained_student_is_saved_and_measured(attached: DistillationTrainer, models: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no trained student; call train\(\) first"):
        attached.save_model(tmp_path / "copy")
    untrained = attached.evaluate()
    summary = attached.train()
    trained = attached.evaluate()
    assert summary is not None and summary.steps == 3 and summary.before is not None and summary.after is not None
    assert untrained is not None and untrained.reverse_kl == pytest.approx(summary.before.reverse_kl)
    assert trained is not None and trained.reverse_kl != pytest.approx(summary.before.reverse_kl)
    attached.save_model(tmp_path / "copy")
    torch.testing.assert_close(weights(tmp_path / "copy"), weights(tmp_path / "out" / "student"))
    assert not torch.equal(weights(tmp_path / "copy"), weights(models["student"]))
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 3
    )  # an evaluation does not replace it
    with pytest.raises(ConfigError, match="is there and not empty"):
        attached.save_model(tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    attached.save_model(tmp_path / "empty")
    assert AutoTokenizer.from_pretrained(tmp_path / "empty").eos_token


def test_an_evaluation_without_held_out_prompts_is_refused(world: World, models: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give eval_dataset"):
        DistillationTrainer(config_in(tmp_path), **models, train_dataset=ROWS).evaluate()


def test_importing_the_package_loads_no_model_library() -> None:
    code = "import sys, trainer; print({'torch', 'transformers', 'vllm'} & set(sys.modules)); trainer.RunConfig; "
    code += "print({'torch', 'vllm'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[:2] == ["set()", "set()"]
