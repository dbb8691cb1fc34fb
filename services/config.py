"""Every option of every role, in one pydantic model; loads neither torch nor vllm.

One TOML file per run, dotted overrides on the command line, the environment for secrets only (services/keys.py).
Units are in the names, ranges on the fields, checks across options in services/config_checks.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from services import addresses, config_checks
from services.cuda_devices import overlap, parse_devices
from services.errors import ConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, AfterValidator(addresses.checked_host)]
"""A name, an IPv4 address, or an IPv6 one with or without brackets."""
Dtype = Literal["float32", "bfloat16", "float16"]
Role = Literal["rollout", "teacher", "train", "up"]
# Padded tokens of a forward pass where there is room.
DEFAULT_TOKENS = 16384
# Positions that the teacher's head projects at once, and completions in flight, likewise.
DEFAULT_HEAD_ROWS, DEFAULT_NUM_SEQS = 1024, 256


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, the docstring under a field is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class StudentConfig(Section):
    """The model that learns."""

    model: str | None = None
    """Folder or hub id of a causal LM; required."""
    model_init_kwargs: dict[str, Any] = {}
    """Further keyword arguments of transformers' from_pretrained, as JSON."""
    dtype: Dtype = "float32"
    """Dtype of the trainer's master weights and optimizer state; float16 cannot be trained, bfloat16 loses small steps."""
    disable_dropout: bool = True
    """Set every dropout probability of the student to zero."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which the body runs forward and backward; master weights keep `dtype`, the head is float32. auto: bfloat16 on
    a GPU when rollout.dtype is half precision, else `dtype`."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time; default: on a GPU."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings along; off unless you have read that code."""
    cuda_devices: str | None = None
    """GPUs of the trainer, as CUDA_VISIBLE_DEVICES takes them, e.g. "1" or "GPU-8932f937"; "": none. Default: the first one."""


class ServerSection(Section):
    """What both servers have in common."""

    urls: list[str] = []
    """Servers the trainer attaches to, e.g. ["http://10.0.0.5:8100"]; default: the host and port of this section."""
    host: Host = "127.0.0.1"
    """Address to listen on, of either family; anything beyond loopback requires a key in the environment."""
    port: Port
    """TCP port to listen on; `up` takes the next free one when it is in use."""
    dtype: Dtype = "float32"
    """Dtype of the weights on this server."""
    cuda_devices: str | None = None
    """GPUs of this server, as CUDA_VISIBLE_DEVICES takes them, e.g. "0,1" or "GPU-8932f937"; "": none. Default: the first."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """How long the trainer and `up` wait for this server to become ready, seconds."""
    request_timeout_s: float = Field(300.0, gt=0)
    """How long the trainer waits for the answer to one request, seconds."""

    def server_urls(self) -> list[str]:
        """The URLs to attach to, each in its one spelling."""
        own = addresses.url_of(addresses.reachable(self.host), self.port)
        return [addresses.checked_url(url, base_path=True) for url in self.urls or [own]]


class RolloutConfig(ServerSection):
    """The vLLM server that samples completions from the student."""

    port: Port = 8100
    """TCP port to listen on; `up` takes a free one when it is in use."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt plus completion, tokens; default: what data.max_prompt_tokens leaves room for, else 4096 or twice the
    longest completion (less on a GPU without that much room), at most what the model's config says."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Key-value cache, GiB; default: 1 on a CPU, computed on a GPU that roles share, else what is left of the GPU."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory vLLM may use; default: computed where roles share the GPU (docs/gpu.md), else 0.9."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs one engine of a server spreads the student over."""
    data_parallel_size: int = Field(1, ge=1)
    """Engines of one server, each with a student and GPUs of its own: for mixtures of experts, which spread their experts over
    them. For other students rather start several servers and name them in rollout.urls: one can fail without the others."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Completions in flight at once; default: 256, less on a GPU without room for so many."""
    float32_head: bool | None = None
    """Compute the logits of a half-precision student in float32, as the trainer does; default: on a GPU. On a CPU each
    call then widens the whole head."""
    max_logprobs: int = Field(64, ge=1)
    """Largest student top-k a request may ask for."""
    max_body_mib: int = Field(64, ge=1)
    """Largest request body, MiB."""
    max_completions_per_request: int = Field(8192, ge=1)
    """Largest prompts times samples of one request."""
    max_pending_requests: int = Field(64, ge=1)
    """Requests that are worked on or wait; one more is answered 429 with Retry-After."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """How long a caller may take to send its body, and to take each part of its answer, seconds; then its completions are
    aborted and its place is free again."""
    request_timeout_s: float = Field(300.0, gt=10)
    """How long the trainer waits while this server says nothing, seconds; every 10 s it says that it lives, however long its
    completions are."""
    seed: int = 0
    """Seed of the server's sampler."""
    engine_args: list[str] = []
    """Further arguments of vLLM's server, passed on as they are, e.g. ["--enable-prefix-caching"]."""


class TeacherConfig(ServerSection):
    """The server that scores completions with the teacher."""

    port: Port = 8101
    """TCP port to listen on; `up` takes a free one when it is in use."""
    model: str | None = None
    """Folder or hub id of a causal LM; required by the teacher server."""
    protocol: Literal["distillserve", "vllm"] = "distillserve"
    """What the servers at teacher.urls speak to the trainer; vllm: they are plain `vllm serve`, at temperature 1 only."""
    named: dict[str, list[str]] = {}
    """Further teachers, for the rows that name them (data.teacher_column): the URLs of each by name, as JSON, e.g. {"maths":
    ["http://10.0.0.7:8101"]}. Start each with `distillserve teacher` (`up` does not); they share this section's key, protocol
    and times."""
    teacher_model_init_kwargs: dict[str, Any] = {}
    """Further keyword arguments of transformers' from_pretrained, as JSON."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings along; off unless you have read that code."""
    accept_different: list[Literal["eos", "chat_template"]] = []
    """Differences to the student that are meant: its end tokens, its rendered chat template."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the forward pass: transformers, or vLLM for its parallelism and quantisation, at temperature 1 only."""
    device: str = "auto"
    """Torch device: "auto" (cuda when there is one), "cpu", "cuda:1"."""
    tokens_per_forward: int | None = Field(None, ge=1)
    """Padded tokens in one forward pass; default: 2048 on a CPU, whose caches hold no more, else 16384, less on
    a GPU without room for so many."""
    rows_per_head_chunk: int | None = Field(None, ge=1)
    """Positions projected to the vocabulary at once, which bounds the memory of the head; default: 1024, less on a GPU
    without room for so many."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that vLLM spreads the teacher over."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """vLLM's key-value cache, GiB; default: 1 on a CPU, computed on a GPU that roles share, else what is left of the GPU."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory vLLM may use; default: computed where roles share the GPU, else 0.9."""
    float32_head: bool | None = None
    """Let vLLM compute the logits of a half-precision teacher in float32, as engine = transformers always does; default: on
    a GPU, but for quantised weights."""
    engine_args: dict[str, Any] = {}
    """Further fields of vLLM's AsyncEngineArgs, as JSON, e.g. {"pipeline_parallel_size": 2, "quantization": "fp8"};
    weights are read from safetensors alone unless {"load_format": ...} says otherwise."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest sequence to score, tokens; default: what the model's config says, in vLLM on a GPU that roles share
    rollout.max_model_len or its default."""
    max_sequences_per_request: int = Field(4096, ge=1)
    """Sequences in one request."""
    max_tokens_per_request: int = Field(1_048_576, ge=1)
    """Tokens in one request, prompts included."""
    max_top_k: int | None = Field(None, ge=1)
    """Largest top_k; default: the vocabulary. The answer's size is bounded by max_answer_mib all the same."""
    max_answer_mib: int = Field(512, ge=1)
    """Largest answer, counted as 8 bytes a candidate, MiB."""
    max_body_mib: int = Field(64, ge=1)
    """Largest request body, MiB."""
    max_pending_requests: int = Field(64, ge=1)
    """Requests waiting for the engine; one more is answered 429 with Retry-After."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """How long a caller may take to send its body, and to take its answer, seconds; then its place is free again."""
    access_log: bool = False
    """A line of log for every answer, not only for refusals and failures."""
    outage_s: float = Field(300.0, gt=0)
    """How long the trainer goes on asking while no teacher answers, seconds; then the run stops."""


class DataConfig(Section):
    """Prompts to train on."""

    path: str | None = None
    """JSONL file with one prompt a row; required by the trainer."""
    eval_path: str | None = None
    """JSONL file of held-out prompts; no evaluation without it."""
    lm_path: str | None = None
    """JSONL file of texts whose cross-entropy loss.alpha_lm weighs."""
    text_column: str = "text"
    """Column of data.lm_path that holds the text."""
    max_text_tokens: int = Field(512, ge=2)
    """Longer texts of data.lm_path are cut into windows of this many tokens."""
    prompt_column: str = "prompt"
    """Column that holds a text prompt, or a list of messages."""
    messages_column: str = "messages"
    """Column that holds a conversation, rendered by the tokenizer's chat template with the row's `tools`; a row has this or
    a prompt."""
    last_assistant_turn: Literal["refuse", "drop"] = "refuse"
    """What is done with messages of the assistant at the end of a conversation, where the student is to answer."""
    answer_column: str = "answer"
    """Column that holds the reference answer, where there is one; used by the evaluation alone."""
    teacher_column: str = "teacher"
    """Column that names the row's teacher in teacher.named; absent or null: that of teacher.urls. Without teacher.named it
    is a column like any other."""
    chat_template_kwargs: dict[str, Any] = {}
    """Keyword arguments of the chat template, as JSON, e.g. {"enable_thinking": false}."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt, tokens; default: what leaves room for max_new_tokens in max_model_len."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a bad row of any of the files does (no prompt, invalid JSON, too long, unknown ids); skipped rows are counted and
    named."""
    shuffle: bool = True
    """Seeded new order in every epoch."""

    @property
    def continues_final_message(self) -> bool:
        """Whether the student goes on with a conversation's last message instead of opening a turn."""
        return bool(self.chat_template_kwargs.get("continue_final_message"))


class SamplingConfig(Section):
    """How the student completes prompts during training."""

    max_new_tokens: int = Field(256, ge=1)
    """Longest completion, tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 is off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0 is off."""


class LossConfig(Section):
    """The MiniLLM objective; formulas and sources in docs/losses.md."""

    rkl_advantage: bool = True
    """Policy-gradient term on the sequence-level reverse KL."""
    single_step_decomposition: bool = True
    """Reverse KL of the next-token distributions as a term of its own."""
    gamma: float = Field(0.0, ge=0, le=1)
    """Discount of future rewards; 0 looks at one token only."""
    length_normalization: bool = True
    """Divide each discounted return by the sum of its discounts."""
    reward_to_go: Literal["auto", "inclusive", "exclusive"] = "auto"
    """Whether a token's own reward is in its advantage; auto: exclusive when the single-step term is on."""
    kd_temperature: float = Field(1.0, gt=0)
    """Divides student and teacher logits before the softmax."""
    single_step_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """Divergence of the single-step term; reverse_kl is MiniLLM's, the others are GKD's."""
    jsd_beta: float = Field(0.5, ge=0, le=1)
    """The teacher's share in the mixture of "jsd"; 0 is forward KL, 1 reverse KL, and near them the gradient almost vanishes."""
    single_step_estimator: Literal["hybrid", "truncated", "full"] = "hybrid"
    """truncated: top_k tokens and a bucket for the rest; hybrid adds sampled tokens for what is inside it; full: every token."""
    support: Literal["teacher_topk", "student_topk"] = "teacher_topk"
    """Whose likeliest tokens the single-step term looks at."""
    top_k: int = Field(32, ge=1)
    """Tokens of the support per position; at most the vocabulary less one."""
    alpha_rkl: float = Field(1.0, ge=0)
    """Weight of the policy-gradient term."""
    alpha_single_step: float = Field(1.0, ge=0)
    """Weight of the single-step term."""
    alpha_reward: float = Field(1.0, ge=0)
    """Weight of rewards besides the teacher, where there are any."""
    alpha_lm: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on the texts of data.lm_path (MiniLLM's L_PT)."""
    advantage_clip: float | None = Field(10.0, gt=0)
    """Bound on the absolute advantage; null for exactness."""
    importance_sampling: Literal["none", "tis", "icepop"] = "tis"
    """Correction for the distance between trainer and rollout policy."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest importance ratio of "tis"."""
    icepop_low: float = Field(0.5, ge=0)
    """Tokens with a smaller ratio are dropped by "icepop"."""
    icepop_high: float = Field(5.0, gt=0)
    """Tokens with a larger ratio are dropped by "icepop"."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """With several updates per batch: the policy ratio counts down to 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """With several updates per batch: the policy ratio counts up to 1 + clip_high."""
    truncated: Literal["train", "mask", "drop"] = "train"
    """Completions that hit max_new_tokens: train on them; mask: only count them in their group of rewards; drop: nowhere."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How token losses become one number; "constant" divides by sequences times max_new_tokens."""

    @property
    def uses_rkl_advantage(self) -> bool:
        return self.rkl_advantage and self.alpha_rkl > 0

    @property
    def uses_single_step(self) -> bool:
        return self.single_step_decomposition and self.alpha_single_step > 0

    @property
    def is_exclusive(self) -> bool:
        """Whether a token's own reward is left to the single-step term (MiniLLM's decomposition, eq. 3)."""
        return self.reward_to_go == "exclusive" or (self.reward_to_go == "auto" and self.uses_single_step)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the teacher's rewards make advantages at all: not when only what follows counts, by nothing."""
        return self.uses_rkl_advantage and not (self.gamma == 0 and self.is_exclusive)

    @property
    def uses_sampled_tokens(self) -> bool:
        """Whether a term is an expectation over the sampled token, which must then come from the student itself."""
        return self.has_policy_gradient or (self.uses_single_step and self.single_step_estimator == "hybrid")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.icepop_low >= self.icepop_high:
            raise ValueError(f"loss.icepop_low = {self.icepop_low} must be below loss.icepop_high = {self.icepop_high}")
        return self


class OptimizerConfig(Section):
    """AdamW, its schedule, and clipping."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class PipelineConfig(Section):
    """How much work a step is, and how it flows."""

    steps: int | None = Field(None, ge=1)
    """Batches to train on, updates_per_batch optimizer steps each; give this or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the prompts; give this or steps."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts a step completes."""
    samples_per_prompt: int = Field(1, ge=1)
    """Completions per prompt."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps on each batch, before the weights are pushed; from the second on the policy ratio is clipped."""
    texts_per_step: int = Field(32, ge=1)
    """Windows of data.lm_path per batch."""
    tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Padded tokens in one forward and backward pass of the trainer; default: 16384, less on a GPU without room for so
    many."""
    max_staleness: int = Field(0, ge=0, le=0)
    """Steps a sample's policy may lag behind the trainer's; 0 is strictly on-policy, the one value this version has."""
    max_quarantine_rate: float = Field(0.05, ge=0, lt=1)
    """Share of a step's samples that may be set aside for bad teacher rows before the run stops."""

    @property
    def micro_batch_tokens(self) -> int:
        return self.tokens_per_micro_batch or DEFAULT_TOKENS


class WeightSyncConfig(Section):
    """How new weights reach the rollout server."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl when student.cuda_devices and rollout.cuda_devices are set, of one kind (numbers or UUIDs) and disjoint,
    else gloo through host memory."""
    bucket_mib: int = Field(256, ge=1)
    """Weights sent in one broadcast, MiB."""
    stage_timeout_s: float = Field(120.0, gt=0)
    """Deadline of each stage of a push, seconds."""
    master_address: Host = "127.0.0.1"
    """Address of the trainer's machine at which rollout servers reach it, and on which it listens for them."""
    master_port: Port | None = None
    """TCP port there; default: any free one."""
    take_over: bool = False
    """Take rollout servers from a run that holds them and lives; it then ends."""
    lease_s: float = Field(30.0, ge=1, le=3600)
    """Silence after which rollout servers count this run as gone, seconds; it speaks six times as often."""
    canary_prompts: int = Field(2, ge=1)
    """Prompts with completions whose logprobs the servers and the trainer compare after each push."""
    canary_tolerance: float | None = Field(None, gt=0)
    """Largest difference of a canary logprob, a mean where the rollouts or the student's compute_dtype are in half precision;
    default: three times what the first push showed, in float32 from 1e-4 to 1e-2, in half precision from 0.05 to 0.1."""

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib << 20


class EvaluationConfig(Section):
    """What is measured before and after (and during) training on data.eval_path: exact match greedily, reverse KL on samples."""

    num_prompts: int | None = Field(None, ge=1)
    """Held-out prompts to use; default: all rows of data.eval_path."""
    every_steps: int = Field(0, ge=0)
    """Steps between evaluations during training; 0: only before and after."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest completion, tokens; default: sampling.max_new_tokens."""
    top_k: int | None = Field(None, ge=1)
    """Teacher logprobs per position for the reverse KL, which is unbiased with any number of them; default: 64, or a whole
    vocabulary of up to 1024 tokens."""


class OutputConfig(Section):
    """What a run leaves behind."""

    dir: str = Field("outputs/run", min_length=1)
    """Folder of the run."""
    overwrite: bool = False
    """Write into a folder that already holds a run, whose files are then replaced."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """accelerate trackers that receive the metrics."""
    project: str = "distillserve"
    """Project name at the trackers."""
    save_every_steps: int = Field(100, ge=0)
    """Steps between students in checkpoints/; 0: none. The student of the last finished step is saved however a run ends."""
    save_total_limit: int = Field(2, ge=1)
    """How many students checkpoints/ keeps, the newest ones."""
    samples_every_steps: int = Field(10, ge=1)
    """Steps between rows in samples.jsonl, from the first step on."""
    samples_per_record: int = Field(2, ge=1)
    """Completions written to samples.jsonl each time."""


class RunConfig(Section):
    """One run of the three roles."""

    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    seed: int = Field(0, ge=0)
    """Seed of prompt order, initialisation and evaluation subsets."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        config_checks.check(self)
        return self

    def longest_completion(self) -> int:
        """Tokens of the longest completion that training or evaluation asks for."""
        return max(self.sampling.max_new_tokens, self.evaluation_max_new_tokens())

    def evaluation_max_new_tokens(self) -> int:
        return self.evaluation.max_new_tokens or self.sampling.max_new_tokens

    def compute_dtype(self, *, on_gpu: bool) -> Literal["float32", "bfloat16"]:
        """What student.compute_dtype stands for: the dtype of the body's products in the trainer."""
        student = self.student
        if student.compute_dtype != "auto":
            return student.compute_dtype
        half = "bfloat16" in (student.dtype, self.rollout.dtype if on_gpu else None) or (
            on_gpu and self.rollout.dtype == "float16"
        )
        return "bfloat16" if half else "float32"

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
            config_checks.check_evaluation_is_used(self)
        except ValueError as error:
            raise ConfigError(str(error)) from error


_REQUIRED: dict[str, list[str]] = {
    "rollout": ["student.model"],
    "teacher": ["teacher.model"],
    "train": ["student.model", "data.path"],
    "up": ["student.model", "teacher.model", "data.path"],
}


# Folders of output.dir that hold students.
_REPLACED = ("student", "checkpoints", ".student.before")


def check_output_dir(config: RunConfig) -> Path:
    """Return the run's folder, refusing one that holds what an earlier run has learned.

    Raises:
        ConfigError: the folder has a summary or a student and output.overwrite is off, or the run starts from that student.
    """
    output, path = config.output, Path(config.output.dir)
    found = [name for name in ("summary.json", *_REPLACED) if (path / name).exists()]
    if found and not output.overwrite:
        raise ConfigError(
            f"output.dir = {str(path)!r} holds an earlier run ({found[0]}); choose another folder or pass "
            "--output.overwrite true, which replaces it"
        )
    for key, model in (("student.model", config.student.model), ("teacher.model", config.teacher.model)):
        folder = Path(model or "").resolve()
        replaced = any(folder.is_relative_to((path / name).resolve()) for name in _REPLACED)
        if model and (replaced or folder == path.resolve()):
            raise ConfigError(
                f"{key} = {model!r} lies in output.dir = {str(path)!r}, where this run replaces it; choose another output.dir"
            )
    return path
