"""The MiniLLM loss and the output head that feeds it: the public names."""

from trainer.loss.advantages import reward_advantages, reward_to_go
from trainer.loss.aggregation import LossTotals
from trainer.loss.head import HeadOutput, support_logprobs
from trainer.loss.metrics import LossMetrics, merge_metrics
from trainer.loss.minillm import LossInputs, estimate_reverse_kl, language_model_loss, minillm_loss

__all__ = [
    "HeadOutput",
    "LossInputs",
    "LossMetrics",
    "LossTotals",
    "estimate_reverse_kl",
    "language_model_loss",
    "merge_metrics",
    "minillm_loss",
    "reward_advantages",
    "reward_to_go",
    "support_logprobs",
]
