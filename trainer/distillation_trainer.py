"""`DistillationTrainer`: a run from Python, with objects where a run file has names.

    config.rollout_client.urls given    attaches to servers that run, as `distillserve train` does
    else                                starts both servers itself, as `distillserve up` does, and ends them

The trainer is this very process, so that its callbacks, functions and data sets are the program's own objects. On several
ranks (torchrun) every rank runs the program; the first one does all of this, the others follow it.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from datasets import Dataset
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from services.config import RunConfig, check_output_dir
from services.config.command_line import explain
from services.config.roles import Role
from services.errors import ConfigError, OutputError, PeerError, WeightSyncError, describe_validation_error
from services.gpus.advice import updated
from services.gpus.cards import make_visible
from services.hub.push import Dtype, push_to_hub
from services.hub.run_folder import What
from services.launch.script_screen import ScriptScreen
from services.launch.started_servers import started_servers, variables
from services.process.files import cannot_write
from services.process.folder_lock import lock_folder
from services.process.folders_before import FoldersBefore
from services.process.signals import Interrupted
from trainer.callbacks.callback import Callback
from trainer.callbacks.run_callbacks import checked_callbacks
from trainer.data.dataset_file import write_dataset, write_rows
from trainer.evaluation.evaluate import Evaluation
from trainer.measure import measure
from trainer.model_folder import model_folder
from trainer.output.report import Summary
from trainer.own_optimizers import OptimizerSource, OwnOptimizers, ScheduleSource
from trainer.reward_names import RewardSource, reward_names
from trainer.rewards.process import refuse_in_worker
from trainer.rollout_function import RolloutFunction
from trainer.train import train
from trainer.user_objects import UserObjects

Model: TypeAlias = str | Path | PreTrainedModel
"""A hub id, a folder, or an object."""
Rows: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A file, or a datasets.Dataset, an IterableDataset or a list of dicts."""
Result = TypeVar("Result")

# Of a measurement, which has nothing to go on from.
_NO_CHECKPOINTS: dict[str, Any] = {
    "save_every_steps": 0,
    "keep_best": False,
    "resume": False,
    "resume_step": None,
}
# Passes over the data where nothing says how long a run is.
_EPOCHS = 1.0


class DistillationTrainer:
    """Distils a teacher into a student.

        DistillationTrainer(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-1.7B", train_dataset=dataset).train()

    Args:
        config: every option of the run; default: the defaults, and one pass over the data.
        student, teacher: in the place of config.student.model and config.teacher.model. An object is saved into the run's
            folder, and that is used: the object itself is not trained.
        train_dataset, eval_dataset: in the place of config.data.path and config.data.eval_path. Of a stream as many rows are
            taken as the run uses.
        processing_class: tokenizer of a student that is an object; default: the one it was loaded with.
        reward_functions: in the place of config.reward.functions: names, functions at the top level of a file, which a process of
            their own imports, or sequence-classification models.
        callbacks: told of the run's events, in their order; `Callback` or transformers.TrainerCallback.
        optimizers: what makes the optimizer and the learning rate's schedule, see trainer/own_optimizers.py; None: AdamW and
            the schedule of config.optimizer.
        rollout_function: completes the prompts in the place of one request, see trainer/rollout_function.py.
        rollout_timeout_s: how long one call of it may take, seconds.

    Raises:
        ConfigError: arguments contradict each other or the config.

    >>> DistillationTrainer(RunConfig(student={"model": "a"}), student="b")
    Traceback (most recent call last):
    services.errors.ConfigError: student = 'b' and config.student.model = 'a' contradict each other; give one of them
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        *,
        student: Model | None = None,
        teacher: Model | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_functions: RewardSource | Sequence[RewardSource] = (),
        callbacks: Sequence[Callback | TrainerCallback] = (),
        optimizers: tuple[OptimizerSource, ScheduleSource] = (None, None),
        rollout_function: RolloutFunction | None = None,
        rollout_timeout_s: float = 600.0,
    ) -> None:
        if config is not None and not isinstance(config, RunConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}; give a trainer.RunConfig, or student=... and teacher=... by name"
            )
        self.config = config or RunConfig()
        self._models = {"student": student, "teacher": teacher}
        self._rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self._tokenizer, self._reward_functions = processing_class, list(_several(reward_functions))
        self._refuse_twice()
        if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
            raise ConfigError(
                "optimizers is a pair: what makes the optimizer, and what makes its schedule; None for a default"
            )
        self._objects = UserObjects(
            callbacks=checked_callbacks(callbacks),
            optimizers=OwnOptimizers(*optimizers),
            rollout_function=rollout_function,
            rollout_timeout_s=rollout_timeout_s,
        )
        self._objects.check(self.config)
        self._is_trained = False

    @property
    def attaches(self) -> bool:
        """Whether the servers run already; else they are started."""
        return bool(self.config.rollout_client.urls)

    # --------------------------------------------------------------------------------------------- what it does

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> Summary | None:
        """Run the whole job; None on ranks but the first.

        However it ends after the first step, short of being killed, the student of the last finished step is in
        config.output.dir, and servers that were started have ended. A run that is unfinished there goes on from its newest
        checkpoint (docs/checkpoints.md).

        Args:
            resume_from_checkpoint: True: refuse to begin anew; a folder: go on from that one of output.dir/checkpoints.

        Raises:
            DistillServeError: whatever a user can act on, see services/errors.py; the run is complete if it is an
                EvaluationError.
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM or SIGHUP came.
        """
        summary = self._run(train, self._resuming(resume_from_checkpoint), self._objects)
        self._is_trained = True
        return summary

    def evaluate(self) -> Evaluation | None:
        """Measure the student on the held-out prompts without training it: that of the last `train`, else as it was given.
        What comes of it is also in config.output.dir/evaluation. None on ranks but the first.

        Raises:
            DistillServeError: as of `train`; an EvaluationError if it cannot be measured.
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM or SIGHUP came.
        """
        folder = str(Path(self.config.output.dir) / "evaluation")
        config = updated(self.config, "output", dir=folder, overwrite=True, trackers=[], **_NO_CHECKPOINTS)
        config = updated(config, "pipeline", steps=1, epochs=None)
        config = updated(config, "optimizer", warmup_steps=0)
        return self._run(measure, config, replace(self._objects, callbacks=()))

    def save_model(self, path: str | Path) -> None:
        """Copy the trained student, with its tokenizer, into a folder of its own; the first rank alone does so.

        Raises:
            ConfigError: nothing has been trained, or the folder is not empty.
            OutputError: it cannot be written.
        """
        if self._is_follower():
            return
        into, student = Path(path), self._trained_student()
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise ConfigError(f"path = {str(path)!r} is there and not empty; choose another folder")
        beside = into.with_name(f".{into.name}.part")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(student, beside)
            if into.exists():
                into.rmdir()
            beside.replace(into)
        except OSError as error:
            raise cannot_write(into, error) from error
        except shutil.Error as error:
            raise OutputError(f"{into} cannot be written: {error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def push_to_hub(
        self,
        repo: str,
        *,
        what: What = "merged",
        step: int | None = None,
        dtype: Dtype | None = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the student of config.output.dir with its model card, in one commit; returns its URL, on other ranks "".

        Args:
            repo, what, step, dtype, private, revision, commit_message: as of `services.hub.push.push_to_hub`.

        Raises:
            DistillServeError: as of that.
        """
        if self._is_follower():
            return ""
        options: dict[str, Any] = {"what": what, "step": step, "dtype": dtype, "private": private}
        options |= {"revision": revision, "commit_message": commit_message}
        return push_to_hub(self.config.output.dir, repo, **options)

    # ---------------------------------------------------------------------------------------------- how it is done

    def _resuming(self, checkpoint: bool | str | Path | None) -> RunConfig:
        """The run with the options that say what it goes on from."""
        if not checkpoint:
            return self.config
        if self.config.output.overwrite:
            raise ConfigError(
                f"resume_from_checkpoint = {str(checkpoint)!r} and config.output.overwrite = True, which replaces the run that it is "
                "of; give one of them"
            )
        if checkpoint is True:
            return updated(self.config, "output", resume=True)
        path, folder = Path(checkpoint), Path(self.config.output.dir) / "checkpoints"
        number = path.name.removeprefix("step-")
        if path.resolve().parent != folder.resolve() or not number.isdecimal():
            raise ConfigError(
                f"resume_from_checkpoint = {str(checkpoint)!r} is no checkpoint of this run, which are {folder}/step-N; give one "
                "of them, True for the newest, or the output.dir around it in the config"
            )
        return updated(self.config, "output", resume_step=int(number))

    def _trained_student(self) -> Path:
        folder = Path(self.config.output.dir) / "student"
        if not self._is_trained or not folder.is_dir():
            raise ConfigError("there is no trained student; call train() first")
        return folder

    def _run(self, work: Callable[[RunConfig, UserObjects], Result], config: RunConfig, objects: UserObjects) -> Result:
        """`work` with the run as the servers have it."""
        refuse_in_worker()
        self._check_ranks()
        environment = dict(os.environ)  # of the servers: before it is narrowed to the trainer's GPUs
        self._choose_gpus()
        try:
            result = work(config, objects) if self._is_follower() else self._lead(work, config, objects, environment)
        except Interrupted as error:  # as Python itself ends a program: an exit code of 1 would say that it failed
            if error.number == signal.SIGINT:
                raise KeyboardInterrupt(str(error)) from error
            raise SystemExit(128 + error.number) from error
        if dist.is_initialized():
            dist.destroy_process_group()  # the program may go on, and train again
        return result

    def _lead(
        self,
        work: Callable[[RunConfig, UserObjects], Result],
        config: RunConfig,
        objects: UserObjects,
        environment: Mapping[str, str],
    ) -> Result:
        folder = Path(config.output.dir)
        with ExitStack() as stack:
            lock = stack.enter_context(lock_folder(folder, "output.dir", "a Python program"))
            stack.enter_context(variables(lock.environment()))
            check_output_dir(config, is_whole=False)
            before = FoldersBefore(folder / "data", folder / "models")
            stack.callback(before.put_back)  # a start that is refused changes nothing
            objects = replace(objects, begun=before.forget, is_stream=self._is_stream(config))
            config = self._with_objects(config)
            screen = stack.enter_context(ScriptScreen(folder / "metrics.jsonl"))
            if self.attaches:
                stack.enter_context(screen.showing_trainer(folder / "logs" / "trainer.log"))
                return work(config, objects)
            servers = stack.enter_context(started_servers(config, screen, environment))
            stack.enter_context(screen.showing_trainer(folder / "logs" / "trainer.log"))
            objects = replace(objects, watch=lambda interruption: servers.tell(interruption.fail))
            try:
                return work(servers.config, objects)
            except (PeerError, WeightSyncError) as error:
                if (lost := servers.lost()) is not None and lost is not error:
                    raise lost from error
                raise

    def _with_objects(self, config: RunConfig) -> RunConfig:
        """The run with names for its objects, which are written into its folder.

        Raises:
            ConfigError: it lacks something, or options do not fit together.
            DataError, StartupError, OutputError: of the objects.
        """
        folder, role = Path(config.output.dir), self._role()
        for name, model in self._models.items():
            if name == "student" and self._is_trained:
                model = self._trained_student()
            if model is not None:
                section = getattr(config, name)
                found = model_folder(
                    name,
                    model,
                    folder / "models" / name,
                    self._tokenizer_of(name),
                    trust_remote_code=section.trust_remote_code,
                )
                config = updated(config, name, model=found)
        pipeline = config.pipeline
        if pipeline.steps is None and pipeline.epochs is None:
            config = updated(config, "pipeline", epochs=_EPOCHS)
        for name, option, limit in (
            ("train_dataset", "path", pipeline.steps and pipeline.steps * pipeline.prompts_per_step),
            ("eval_dataset", "eval_path", config.evaluation.num_prompts),
        ):
            if (rows := self._rows[name]) is not None:
                config = updated(config, "data", **{option: _file_of(name, rows, folder / "data", limit)})
        if self._reward_functions:
            config = updated(config, "reward", functions=reward_names(self._reward_functions, folder / "models"))
        config = updated(config, "trainer", num_processes=_number_of_ranks("LOCAL_WORLD_SIZE"))
        try:
            config = RunConfig.model_validate(config.model_dump(), context={"role": role})
        except ValidationError as error:
            raise ConfigError("; ".join(explain(*one) for one in describe_validation_error(error))) from error
        config.require(role)
        return config

    def _is_stream(self, config: RunConfig) -> bool:
        """Whether the training rows are the beginning of a stream, as long as the run. Where some of them are held out, they are a
        file like others: of a longer one others would be."""
        return (
            config.pipeline.steps is not None
            and config.data.held_out is None
            and _is_stream(self._rows["train_dataset"])
        )

    def _role(self) -> Role:
        """The command that does the same.

        Raises:
            ConfigError: one kind of server is there, the other is not.
        """
        client = self.config.teacher_client
        if not self.attaches and (client.urls or client.named):
            raise ConfigError(
                "teacher_client names servers that run, rollout_client.urls does not; give both to attach to running servers, or "
                "neither to have both started"
            )
        return "train" if self.attaches else "up"

    def _tokenizer_of(self, name: str) -> PreTrainedTokenizerBase | None:
        """processing_class is the student's; a teacher that was loaded from nowhere can only have the same one."""
        model = self._models[name]
        is_from_nowhere = not isinstance(model, str | Path) and not getattr(model, "name_or_path", "")
        has_changed = name == "student" and self._is_trained
        return self._tokenizer if (name == "student" or is_from_nowhere) and not has_changed else None

    def _refuse_twice(self) -> None:
        """Refuse what is named in the config and handed over as well."""
        data = self.config.data
        pairs = (
            ("student", self._models["student"], "student.model", self.config.student.model),
            ("teacher", self._models["teacher"], "teacher.model", self.config.teacher.model),
            ("train_dataset", self._rows["train_dataset"], "data.path", data.path),
            ("eval_dataset", self._rows["eval_dataset"], "data.eval_path", data.eval_path),
        )
        for name, given, option, named in pairs:
            if given is not None and named is not None and str(given) != named:
                shown = repr(str(given)) if isinstance(given, str | Path) else f"a {type(given).__name__}"
                raise ConfigError(
                    f"{name} = {shown} and config.{option} = {named!r} contradict each other; give one of them"
                )
        if self._reward_functions and self.config.reward.functions:
            raise ConfigError("reward_functions and config.reward.functions are both given; give one of them")
        teacher = self._models["teacher"]
        if self.attaches and teacher is not None and not isinstance(teacher, str | Path):
            raise ConfigError(
                "teacher is an object, but config.rollout_client.urls says that the servers run already; leave the one or the other "
                "out"
            )
        if self._tokenizer is not None and self._models["student"] is None:
            raise ConfigError("processing_class belongs to the student; give student=... as well")

    def _choose_gpus(self) -> None:
        """Let this process see the trainer's GPUs alone, if it has not looked at them yet."""
        devices = self.config.student.cuda_devices
        if devices is not None and torch.cuda.is_initialized():
            raise ConfigError(
                f"student.cuda_devices = {devices!r} comes too late, this program has used a GPU already; set "
                "CUDA_VISIBLE_DEVICES before it starts"
            )
        make_visible("student.cuda_devices", devices)

    def _check_ranks(self) -> None:
        wanted = self.config.trainer.num_processes
        if wanted > 1 and _number_of_ranks("WORLD_SIZE") == 1:
            raise ConfigError(
                f"trainer.num_processes = {wanted}, but this program was started alone; start it with "
                f"`torchrun --nproc-per-node {wanted} PROGRAM`"
            )

    def _is_follower(self) -> bool:
        return _number_of_ranks("WORLD_SIZE") > 1 and os.environ.get("RANK", "0") != "0"


def _several(given: Any) -> Sequence[Any]:
    """A list of objects; one alone, which TRL takes as well, is a list of one."""
    return given if isinstance(given, list | tuple) else [given]


def _number_of_ranks(variable: str) -> int:
    """What a launcher says, 1 where there is none; a broken environment is join_ranks' to name."""
    word = os.environ.get(variable, "1")
    return max(1, int(word)) if word.isdecimal() else 1


def _file_of(name: str, rows: Rows, folder: Path, limit: int | None) -> str:
    """The file, or folder, of a data set.

    Args:
        limit: rows that the run uses of a stream; None: all.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Dataset):
        return write_dataset(rows, folder / name)
    return write_rows(name, rows, folder / f"{name}.jsonl", limit if _is_stream(rows) else None)


def _is_stream(rows: Rows | None) -> bool:
    return not (rows is None or isinstance(rows, str | Path) or hasattr(rows, "__len__"))
