"""Options of a run, a file a section."""

from services.config.client import ClientSection
from services.config.data import DataConfig
from services.config.evaluation import EvaluationConfig
from services.config.lora import LoraConfig
from services.config.loss import LossConfig
from services.config.optimizer import OptimizerConfig
from services.config.output import OutputConfig
from services.config.output_dir import check_output_dir
from services.config.pipeline import PipelineConfig
from services.config.reward import RewardConfig
from services.config.rollout import RolloutConfig
from services.config.rollout_client import RolloutClientConfig
from services.config.run import RunConfig
from services.config.sampling import SamplingConfig
from services.config.section import DEFAULT_HEAD_ROWS, DEFAULT_NUM_SEQS, DEFAULT_TOKENS
from services.config.server import ServerSection
from services.config.student import StudentConfig
from services.config.teacher import TeacherConfig
from services.config.teacher_client import TeacherClientConfig
from services.config.trainer import TrainerConfig
from services.config.up import UpConfig
from services.config.weight_sync import WeightSyncConfig

__all__ = [
    "DEFAULT_HEAD_ROWS",
    "DEFAULT_NUM_SEQS",
    "DEFAULT_TOKENS",
    "ClientSection",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PipelineConfig",
    "RewardConfig",
    "RolloutClientConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "ServerSection",
    "StudentConfig",
    "TeacherClientConfig",
    "TeacherConfig",
    "TrainerConfig",
    "UpConfig",
    "WeightSyncConfig",
    "check_output_dir",
]
