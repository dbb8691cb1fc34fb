"""A push is repeated once in full, then the run stops; nothing wrong passes the canary."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.config import RunConfig
from services.errors import PeerError, StartupError, WeightSyncError
from services.schemas import RolloutCompletion, RolloutSampling, VersionSpan
from tests.models import save_model
from tests.unit.trainer.test_preflight import rollout_info
from trainer.model import load_student
from trainer.prompts import Prompt
from trainer.weight_sync import WeightSync, check_version

URL = "http://rollout"
PROMPT = [40, 50]


@dataclass
class Server:
    """A rollout server and the engine that pushes to it; `script` says what goes wrong, one entry a push."""

    script: list[str]
    connections: int = 0
    version: str = "default"
    events: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=lambda: [URL])
    asked: list[tuple[list[int], int]] = field(default_factory=list)

    def connect(self, sync: WeightSync) -> "Server":
        self.connections += 1
        self.sync = sync
        return self

    def send_weights(self) -> None:
        self.trouble = self.script.pop(0)
        if self.trouble == "breaks":
            raise RuntimeError("Connection closed by peer\nand a long story")
        if self.trouble == "breaks without a word":
            raise TimeoutError
        if self.trouble != "keeps the old version":
            self.version = str(self.sync._control.version)

    def shutdown(self) -> None:
        self.events.append("shutdown")

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        self.asked += [(prompt, sampling.max_new_tokens) for prompt in prompts]
        if self.trouble == "is silent":
            raise PeerError("no answer")
        shift = 0.01 if self.trouble == "garbles" else 0.0
        tokens = np.array([60, 61], np.int32)
        found = []
        for index in range(len(prompts)):
            blank = RolloutCompletion(
                index, 0, tokens, np.zeros(2, np.float32), "stop", [VersionSpan(self.version, 0, 2)]
            )
            logprobs = self.sync._differences([prompts[index]], [blank])  # |ours - 0| is minus our logprob
            found.append(RolloutCompletion(index, 0, tokens, shift - logprobs, "stop", blank.policy_versions))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("m"), "llama")


def attach(
    server: Server,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    student: dict[str, Any] | None = None,
    **info: object,
) -> WeightSync:
    config = RunConfig(student={"model": folder} | (student or {}))
    model = load_student(config.student)
    canaries = [Prompt(1, PROMPT, ""), Prompt(2, [*PROMPT, 3], "")]
    sync = WeightSync(config, model, server, [rollout_info(**info)], canaries, None)  # type: ignore[arg-type]
    monkeypatch.setattr(sync, "_connect", lambda: server.connect(sync))
    monkeypatch.setattr(sync._control, "pause", lambda: server.events.append("pause"))
    monkeypatch.setattr(sync._control, "resume", lambda: server.events.append("resume"))
    return sync


async def test_a_push_pauses_sends_and_resumes_over_one_connection(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(["works", "works"])
    sync = attach(server, folder, monkeypatch)
    assert (await sync.push(0))["canary_residual"] <= 1e-6
    await sync.push(1)
    assert server.events == ["pause", "resume"] * 2
    assert (server.connections, server.version) == (1, "1")


@pytest.mark.parametrize(
    "trouble", ["breaks", "breaks without a word", "keeps the old version", "garbles", "is silent"]
)
async def test_a_failed_push_is_repeated_in_full_over_a_new_connection(
    trouble: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server([trouble, "works"])
    metrics = await attach(server, folder, monkeypatch).push(4)
    assert server.connections == 2 and server.version == "4" and metrics["canary_residual"] <= 1e-6
    assert "shutdown" in server.events


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("breaks", "push of version 4: Connection closed by peer$"),
        ("breaks without a word", "push of version 4: TimeoutError$"),
        ("keeps the old version", r"answers under version \['default'\] after a push of version 4"),
        ("garbles", r"canary of version 4 on http://rollout: .* by 0\.01, more than 0\.0001 \(float32\)"),
    ],
)
async def test_a_push_that_fails_twice_stops_the_run(
    trouble: str, message: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightSyncError, match=message):
        await attach(Server([trouble] * 2), folder, monkeypatch).push(4)


def test_one_token_of_another_version_is_an_error() -> None:
    spans = [VersionSpan("3", 0, 1), VersionSpan("4", 1, 2)]
    completion = RolloutCompletion(0, 0, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", spans)
    with pytest.raises(WeightSyncError, match=r"http://rollout answers under version \['3', '4'\]"):
        check_version(URL, [completion], 4)


async def test_a_looser_tolerance_lets_a_larger_residual_pass_and_reports_it(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(["garbles"])
    sync = attach(server, folder, monkeypatch)
    sync._config = RunConfig(weight_sync={"canary_tolerance": 0.02})
    assert (await sync.push(1))["canary_residual"] == pytest.approx(0.01, abs=1e-5)
    assert server.connections == 1


@pytest.mark.parametrize("differences", [[0.001, np.nan], [np.nan, np.nan]])
def test_a_residual_that_is_no_number_never_passes(
    differences: list[float], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = attach(Server([]), folder, monkeypatch)
    with pytest.raises(WeightSyncError, match="differ from the trainer's by nan"):
        sync._check_residual(URL, 1, np.array(differences))


def test_half_precision_is_judged_by_the_mean(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = attach(Server([]), folder, monkeypatch, dtype="bfloat16")
    assert sync._check_residual(URL, 1, np.array([0.08, 0.0])) == pytest.approx(0.04)
    with pytest.raises(WeightSyncError, match=r"by 0\.06, more than 0\.05 \(bfloat16\)"):
        sync._check_residual(URL, 1, np.array([0.12, 0.0]))


def test_servers_of_different_dtypes_are_refused(folder: str) -> None:
    servers = Server([], urls=[URL, "http://other"])
    infos = [rollout_info(), rollout_info(dtype="bfloat16")]
    with pytest.raises(StartupError, match="different dtypes"):
        WeightSync(RunConfig(), load_student(RunConfig(student={"model": folder}).student), servers, infos, [], None)  # type: ignore[arg-type]


def test_both_ends_must_mean_the_same_backend(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"over nccl, this trainer would send over gloo.*weight_sync\.backend"):
        attach(Server([]), folder, monkeypatch, weight_transfer_backend="nccl")


@pytest.mark.parametrize(
    ("limit", "num_new", "kept"), [(2, 1, 1), (3, 1, 2), (5, 2, 3), (16, 8, 8), (17, 8, 9), (32, 16, 16), (64, 16, 40)]
)
async def test_a_canary_fits_into_the_shortest_server(
    limit: int, num_new: int, kept: int, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(["works"])
    sync = attach(server, folder, monkeypatch, max_model_len=limit)
    sync._prompts = [list(range(40))]
    await sync.push(0)
    assert server.asked == [(list(range(40))[-kept:], num_new)]


def completion_of(tokens: list[int], logprobs: torch.Tensor) -> RolloutCompletion:
    ids, spans = np.array(tokens, np.int32), [VersionSpan("0", 0, len(tokens))]
    return RolloutCompletion(0, 0, ids, logprobs.detach().numpy(), "stop", spans)


def test_a_canary_of_a_longrope_student_is_compared_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = attach(Server([]), save_model(tmp_path, "phi3"), monkeypatch)
    prompts, answers = [[1, 2], [3], [4, 5, 6]], [[7, 8], list(range(20)), [9] * 5]
    completions = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        alone = sync._model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        completions.append(completion_of(tokens, alone.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)))
    differences = sync._differences(prompts, completions)
    assert differences.shape == (27,) and differences.max() < 1e-5
    sync._config = RunConfig(pipeline={"tokens_per_micro_batch": 1})  # and it takes no more memory than training
    assert sync._differences(prompts, completions).max() < 1e-5


def test_a_canary_is_compared_without_the_students_dropout(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = attach(Server([]), folder, monkeypatch)
    options = {"model": folder, "disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.9}}
    sync._model = load_student(RunConfig(student=options).student)
    completion = completion_of([60, 61, 62], torch.zeros(3))
    first, second = (sync._differences([PROMPT], [completion]) for _ in range(2))
    assert first.tolist() == second.tolist() and sync._model.training


def test_a_student_in_half_precision_is_judged_as_half_precision_rollouts_are(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = attach(Server([]), folder, monkeypatch, student={"compute_dtype": "bfloat16"})
    assert sync._check_residual(URL, 1, np.array([0.08, 0.0])) == pytest.approx(0.04)
    with pytest.raises(WeightSyncError, match=r"by 0\.06, more than 0\.05 \(bfloat16\)"):
        sync._check_residual(URL, 1, np.array([0.06, 0.06]))


CARD = "8932f937-d72c-4106-c12f-20bd9faed9f6"


def on_cuda(monkeypatch: pytest.MonkeyPatch, uuid: str) -> Any:
    """A model that says that it is on GPU 1, and a torch that knows that card."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    return SimpleNamespace(device=torch.device("cuda:1"))


@pytest.mark.parametrize("uuid", [CARD, CARD.upper(), f"GPU-{CARD}"])
def test_nccl_to_a_server_on_the_trainers_own_card_is_refused(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = RunConfig(weight_sync={"backend": "nccl"}), on_cuda(monkeypatch, uuid)
    infos = [
        rollout_info(weight_transfer_backend="nccl", gpu_uuids=[f"GPU-{card}"]) for card in (CARD[::-1].lower(), CARD)
    ]
    client = SimpleNamespace(urls=["http://far", URL])
    with pytest.raises(StartupError, match=rf"{URL} runs on this trainer's card GPU-{CARD}.*give student.cuda_devices"):
        WeightSync(config, model, client, infos, [], None)  # type: ignore[arg-type]
    WeightSync(config, model, SimpleNamespace(urls=["http://far"]), infos[:1], [], None)  # type: ignore[arg-type]


def test_nccl_from_a_cpu_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = RunConfig(weight_sync={"backend": "nccl"}), SimpleNamespace(device=torch.device("cpu"))
    client, infos = SimpleNamespace(urls=[URL]), [rollout_info(weight_transfer_backend="nccl")]
    with pytest.raises(StartupError, match="needs the trainer on a GPU, it is on cpu"):
        WeightSync(config, model, client, infos, [], None)  # type: ignore[arg-type]


async def test_a_push_from_a_gpu_waits_for_the_optimizer_on_the_models_device_in_its_own_thread(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, calls = Server(["works"]), []
    sync = attach(server, folder, monkeypatch)
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda d, name=name: calls.append((name, d, threading.get_ident())))
    send = server.send_weights
    monkeypatch.setattr(server, "send_weights", lambda: (calls.append(("send", None, threading.get_ident())), send()))
    connect = sync._connect
    monkeypatch.setattr(
        sync, "_connect", lambda: (calls.append(("connect", None, threading.get_ident())), connect())[1]
    )
    on_cpu = sync._model
    sync._model = on_cuda(monkeypatch, CARD)

    async def no_canary(version: int) -> float:
        return 0.0

    monkeypatch.setattr(sync, "_run_canary", no_canary)
    await sync.push(0)
    assert [name for name, *_ in calls] == ["set_device", "synchronize", "connect", "send"]
    assert {device for _, device, _ in calls[:2]} == {torch.device("cuda:1")}
    assert len({thread for *_, thread in calls}) == 1 and calls[0][2] != threading.get_ident()
    calls.clear()
    sync._model, server.script = on_cpu, ["works"]
    await sync.push(1)
    assert [name for name, *_ in calls] == ["send"]
