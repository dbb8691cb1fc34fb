"""One run of a TRL trainer, in an environment of TRL's own; takes and writes JSON, and loads nothing of this project.

usage: python trl_side.py JOB ANSWER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds of each optimizer step with all that belongs to it: generation, both models' forward passes, the update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def trainer_and_config(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The class, its configuration's class, and the options that only it has."""
    if name == "MiniLLMTrainer":
        from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer

        return MiniLLMTrainer, MiniLLMConfig, {"num_generations": 1}
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer, DistillationConfig, {"beta": 1.0}


def main(job: dict[str, Any]) -> dict[str, Any]:
    trainer_class, config_class, options = trainer_and_config(job["trainer"])
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    config = config_class(
        output_dir=job["output"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        max_completion_length=job["max_new_tokens"],
        temperature=1.0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=job["warmup_steps"],
        adam_beta2=job["beta2"],
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=job["seed"],
        use_cpu=True,
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    times = StepTimes()
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left")
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    if job["saves"]:
        trainer.model.save_pretrained(job["output"])
        tokenizer.save_pretrained(job["output"])
    return {"step_s": [after - before for before, after in zip(times.ends, times.ends[1:], strict=False)]}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
