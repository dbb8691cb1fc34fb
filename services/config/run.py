"""A run: every option of every role, a file a section; loads neither torch nor vllm.

One TOML file per run, dotted overrides on the command line, the environment for secrets only (services/config/keys.py).
Units are in the names, ranges on the fields, checks across options in services/config/checks.py.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from services.config import checks, lora_checks
from services.config.cuda_devices import overlap, parse_devices
from services.config.data import DataConfig
from services.config.evaluation import EvaluationConfig
from services.config.lora import LoraConfig
from services.config.loss import LossConfig
from services.config.optimizer import OptimizerConfig
from services.config.output import OutputConfig
from services.config.pipeline import PipelineConfig
from services.config.reward import RewardConfig
from services.config.roles import Role
from services.config.rollout import RolloutConfig
from services.config.rollout_client import RolloutClientConfig
from services.config.sampling import SamplingConfig
from services.config.section import Section
from services.config.student import StudentConfig
from services.config.teacher import TeacherConfig
from services.config.teacher_client import TeacherClientConfig
from services.config.trainer import TrainerConfig
from services.config.up import UpConfig
from services.config.weight_sync import WeightSyncConfig
from services.errors import ConfigError


class RunConfig(Section):
    """One run of the three roles."""

    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig()
    rollout_client: RolloutClientConfig = RolloutClientConfig()
    teacher: TeacherConfig = TeacherConfig()
    teacher_client: TeacherClientConfig = TeacherClientConfig()
    trainer: TrainerConfig = TrainerConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()
    reward: RewardConfig = RewardConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    up: UpConfig = UpConfig()
    seed: int = Field(0, ge=0)
    """Seed of prompt order, initialisation and evaluation subsets."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_base(cls, given: Any) -> Any:
        return lora_checks.with_base_resolved(given)

    @model_validator(mode="after")
    def _check_across_sections(self, info: ValidationInfo) -> Self:
        checks.check(self, (info.context or {}).get("role", "up"))
        return self

    def rollout_urls(self) -> list[str]:
        """The rollout servers that the trainer attaches to."""
        return self.rollout_client.server_urls(self.rollout)

    def teacher_urls(self) -> list[str]:
        """The servers that score rows which name no teacher."""
        return self.teacher_client.server_urls(self.teacher)

    @property
    def learns_rewards(self) -> bool:
        """Whether rewards besides the teacher's are in the loss; with loss.alpha_reward = 0 they are only measured."""
        return bool(self.reward.functions) and self.loss.alpha_reward > 0

    def longest_completion(self) -> int:
        """Tokens of the longest completion that training or evaluation asks for."""
        return max(self.sampling.max_new_tokens, self.evaluation_max_new_tokens())

    def evaluation_max_new_tokens(self) -> int:
        return self.evaluation.max_new_tokens or self.sampling.max_new_tokens

    def compute_dtype(self, *, on_gpu: bool) -> Literal["float32", "bfloat16"]:
        """What student.compute_dtype stands for: the dtype of the body's products in the trainer."""
        student = self.student
        if self.lora.load_in_4bit:  # what is not in four bits is cast by nobody
            return "bfloat16" if student.dtype == "bfloat16" else "float32"
        if student.compute_dtype != "auto":
            return student.compute_dtype
        half = "bfloat16" in (student.dtype, self.rollout.dtype if on_gpu else None) or (
            on_gpu and self.rollout.dtype == "float16"
        )
        return "bfloat16" if half else "float32"

    def master_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The dtype of the weights that are trained: those of an adapter are float32, but beside weights in four bits, where
        nothing is cast on its way, what is not an adapter decides."""
        return "float32" if self.lora.is_on and not self.lora.load_in_4bit else self.student.dtype

    def uses_gradient_checkpointing(self, *, on_gpu: bool) -> bool:
        """What student.gradient_checkpointing stands for."""
        given = self.student.gradient_checkpointing
        return on_gpu if given is None else given

    def weight_sync_backend(self) -> Literal["nccl", "gloo"]:
        """The backend that "auto" stands for; the server and the trainer both ask here."""
        if self.weight_sync.backend != "auto":
            return self.weight_sync.backend
        ours, theirs = (
            parse_devices("cuda_devices", section.cuda_devices or "") for section in (self.student, self.rollout)
        )
        # Not by asking the driver: the two may be on different machines and must come to the same answer.
        return "nccl" if ours and theirs and overlap(ours, theirs) is False else "gloo"

    def require(self, role: Role) -> None:
        """Refuse a config that lacks what `role` cannot do without, or holds options of what it does not do.

        Raises:
            ConfigError: names the first missing option and how to give it, or the first that would be ignored.
        """
        for key in _REQUIRED[role]:
            section, name = key.split(".")
            if getattr(getattr(self, section), name) in (None, ""):
                raise ConfigError(
                    f"{key} is required by `distillserve {role}`; set it in the run file or pass --{key} VALUE"
                )
        if role not in ("train", "up"):
            return
        if self.pipeline.steps is None and self.pipeline.epochs is None:
            raise ConfigError(
                f"pipeline.steps is required by `distillserve {role}`; pass --pipeline.steps N or --pipeline.epochs N"
            )
        try:
            checks.check_evaluation_is_used(self)
        except ValueError as error:
            raise ConfigError(str(error)) from error


_REQUIRED: dict[str, list[str]] = {
    "rollout": ["student.model"],
    "teacher": ["teacher.model"],
    "train": ["student.model", "data.path"],
    "up": ["student.model", "teacher.model", "data.path"],
}
