"""Roles that share a GPU: who they are, what each may take, and what is said when they do not fit."""

import itertools
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from services.config import RunConfig
from services.errors import ConfigError
from services.gpus.memory import GIB, Share, usable_bytes
from services.gpus.options import computed, with_shares
from services.gpus.plan import plan
from services.gpus.sharing import ROLES, check_nccl, servers_share_a_gpu
from tests.unit.services.fake_gpus import UUIDS, install_torch
from tests.unit.services.gpus.planning import SHAPES, planned, run
from tests.unit.services.shapes import QWEN3_0_6B, QWEN3_1_7B

# Two GPUs, the first of them the trainer's alone.
APART: dict[str, dict[str, Any]] = {"rollout": {"cuda_devices": "1"}, "teacher": {"cuda_devices": "1"}}


@pytest.mark.parametrize(
    "total", [22.5 * GIB, 24e9, 24 * GIB, 48 * GIB, 80e9, 80 * GIB], ids=lambda n: f"{n / 1e9:.0f}GB"
)
def test_the_readmes_own_models_fit_one_gpu(total: float, gpus: Any) -> None:
    gpus(total)
    (gpu,) = planned(run()).gpus
    assert list(gpu.shares) == ["rollout", "teacher", "trainer"]
    assert gpu.needed <= usable_bytes(gpu.gpu.total_bytes)
    longest_answers = 8 * 512 * 114_688
    assert gpu.shares["rollout"].kv_cache >= longest_answers


@pytest.mark.parametrize("total", [24e9, 24 * GIB, 80e9])
def test_the_run_of_the_containers_fits_one_gpu_in_every_role(total: float, gpus: Any) -> None:
    gpus(total)
    written = tomllib.loads(Path("deploy/runs/qwen3.toml").read_text())
    for section, model in (("student", "student"), ("teacher", "teacher")):
        written[section]["model"] = model
    for section in ("student", "rollout", "teacher"):
        written[section]["cuda_devices"] = "0"  # as compose.yaml says
    config = RunConfig(**written)
    for role in (*ROLES, None):
        (gpu,) = planned(config, role).gpus
        assert list(gpu.shares) == list(ROLES) and gpu.needed <= usable_bytes(gpu.gpu.total_bytes)


def test_the_page_shows_what_the_readmes_example_comes_to(gpus: Any) -> None:
    parts = []
    for total in (24 * GIB, 80e9):
        gpus(total)
        parts += planned(run()).gpus[0].shares.values()
    page = Path("docs/gpu.md").read_text()
    names = {"kv_cache": "key-value cache", "other": "process, graphs", "total": "together"}
    for part in (*(field.name for field in fields(Share)), "total"):
        cells = (f"{value / GIB:.1f}" if (value := getattr(share, part)) else "" for share in parts)
        row = " | ".join(["", names.get(part, part), *cells, ""]).strip()
        assert row.replace("|  |", "| |").replace("|  |", "| |") in page, row


def test_what_the_readmes_example_comes_to_on_24_and_80_gb(gpus: Any) -> None:
    gpus(24 * GIB)
    small = planned(run())
    rollout = with_shares(run(), "rollout", small).rollout
    assert (rollout.max_model_len, rollout.max_num_seqs, rollout.kv_cache_gib) == (4096, 256, 1.75)
    assert rollout.gpu_memory_utilization == pytest.approx(small.gpus[0].shares["rollout"].total / (24 * GIB), abs=1e-3)
    teacher = with_shares(run(), "teacher", small).teacher
    assert (teacher.tokens_per_forward, teacher.rows_per_head_chunk) == (16384, 441)
    assert with_shares(run(), "trainer", small).pipeline.tokens_per_micro_batch == 4096
    gpus(80e9)
    large = planned(run()).sizes
    assert (large.tokens_per_forward, large.tokens_per_micro_batch, large.max_num_seqs) == (16384, 16384, 256)
    assert large.kv_tokens == 64 * 4096  # every prompt of a step at its longest


def test_a_role_that_is_started_alone_takes_what_it_would_take_with_the_others(gpus: Any) -> None:
    for total, changes in itertools.product((24 * GIB, 80e9), ({}, {"student": {"cuda_devices": "1"}})):
        gpus(total, total)
        together = planned(run(**changes))
        for role in ROLES:
            assert with_shares(run(**changes), role, planned(run(**changes), role)) == with_shares(
                run(**changes), role, together
            )


def test_containers_on_one_card_share_it_when_all_say_so(gpus: Any) -> None:
    gpus(80e9)
    urls = {f"{name}_client": {"urls": [f"http://{name}:8100"]} for name in ("rollout", "teacher")}
    assert list(planned(run(**urls), "trainer").gpus[0].shares) == ["trainer"]  # machines of their own
    devices = {name: {"cuda_devices": "0"} for name in ("student", "rollout", "teacher")} | urls
    assert with_shares(run(**devices), "rollout", planned(run(**devices), "rollout")).rollout.kv_cache_gib == (
        with_shares(run(), "rollout", planned(run())).rollout.kv_cache_gib
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9",
        "http://localhost:9",
        "http://[::1]:9",
        "http://LOCALHOST.:9",
        "http://[::ffff:127.0.0.1]:9",
    ],
)
def test_servers_behind_loopback_are_on_this_machine(url: str, gpus: Any) -> None:
    gpus(80e9)
    assert len(planned(run(teacher_client={"urls": [url]}), "trainer").gpus[0].shares) == 3


def test_a_server_plans_beside_a_url_that_the_trainer_will_refuse(gpus: Any) -> None:
    gpus(80e9)
    given = run().model_dump() | {"teacher_client": {"urls": ["nowhere"]}}
    config = RunConfig.model_validate(given, context={"role": "rollout"})
    assert list(planned(config, "rollout").gpus[0].shares) == ["rollout", "trainer"]


def test_a_server_alone_on_its_gpu_keeps_what_vllm_takes_by_itself(gpus: Any) -> None:
    gpus(80e9, 80e9)
    config = run(rollout={"cuda_devices": "1"})
    rollout = with_shares(config, "rollout", planned(config, "rollout")).rollout
    assert (rollout.gpu_memory_utilization, rollout.kv_cache_gib) == (None, None)
    assert rollout.max_model_len == 4096  # the model's own 40,960 would cost 4.7 GB a sequence


def test_a_server_alone_that_needs_more_than_vllm_takes_by_itself_is_given_it(gpus: Any) -> None:
    gpus(4.6 * GIB, 80e9)  # the rollouts of Qwen3-1.7B in bfloat16, whose cache holds 2,048 tokens
    devices = {"student": {"cuda_devices": "1"}, "teacher": {"cuda_devices": "1"}, "rollout": {"cuda_devices": "0"}}
    config = run(**devices, data={"max_prompt_tokens": 256}, sampling={"max_new_tokens": 256})
    utilizations = []
    for tenths in range(20, 60):
        gpus(tenths / 10 * GIB, 80e9)
        try:
            found = planned(config, "rollout")
        except ConfigError:
            continue
        rollout = with_shares(config, "rollout", found).rollout
        share = found.gpus[0].shares["rollout"]
        utilizations.append(rollout.gpu_memory_utilization)
        assert share.total <= (rollout.gpu_memory_utilization or 0.9) * found.gpus[0].gpu.total_bytes
        assert rollout.kv_cache_gib is None
    assert None in utilizations and any(utilizations)


def test_a_teacher_of_its_own_shares_with_nobody(gpus: Any) -> None:
    gpus(24 * GIB)
    found = plan(RunConfig(teacher={"model": "teacher", "dtype": "bfloat16"}), "teacher", SHAPES.get)
    assert found is not None and list(found.gpus[0].shares) == ["teacher"]


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("rollout", "kv_cache_gib", 3.0),
        ("rollout", "max_model_len", 2000),
        ("rollout", "max_num_seqs", 48),
        ("rollout", "gpu_memory_utilization", 0.25),
        ("teacher", "tokens_per_forward", 3000),
        ("teacher", "rows_per_head_chunk", 33),
        ("pipeline", "tokens_per_micro_batch", 5000),
    ],
)
def test_what_is_set_is_honoured_and_counted(section: str, option: str, value: float, gpus: Any) -> None:
    gpus(26 * GIB)
    config = run(**{section: {option: value}})
    found = planned(config)
    for role in ROLES:
        config = with_shares(config, role, found)
    assert getattr(getattr(config, section), option) == value
    assert all(gpu.needed <= usable_bytes(gpu.gpu.total_bytes) for gpu in found.gpus)
    share = found.gpus[0].shares["rollout"]
    if option == "kv_cache_gib":
        assert share.kv_cache == 3 * GIB
    if option == "gpu_memory_utilization":
        assert share.total == pytest.approx(0.25 * 26 * GIB, rel=1e-6)
        assert config.rollout.kv_cache_gib is None  # vLLM fills its share


def test_a_vllm_teacher_gets_a_share_and_a_cache(gpus: Any) -> None:
    gpus(80e9)
    config = run(teacher={"engine": "vllm"})
    found = planned(config)
    teacher = with_shares(config, "teacher", found).teacher
    share = found.gpus[0].shares["teacher"]
    assert teacher.kv_cache_gib == share.kv_cache / GIB and teacher.tokens_per_forward is None
    assert teacher.gpu_memory_utilization == pytest.approx(share.total / 80e9, abs=2e-3)
    RunConfig.model_validate(with_shares(config, "teacher", found).model_dump())  # nothing that would be ignored is set


@pytest.mark.parametrize(
    ("section", "engine_args", "parts"),
    [
        ("teacher", {"pipeline_parallel_size": 2}, 2),
        ("teacher", {"data_parallel_size": 2}, 1),
        ("rollout", ["--pipeline-parallel-size", "2"], 2),
        ("rollout", ["-pp", "2"], 2),
    ],
)
def test_gpus_that_engine_args_ask_for_are_counted(section: str, engine_args: Any, parts: int, gpus: Any) -> None:
    gpus(80e9, 80e9)
    engine = {"engine": "vllm"} if section == "teacher" else {}
    found = planned(run(**{section: {"engine_args": engine_args, **engine}}))
    shape = QWEN3_1_7B if section == "teacher" else QWEN3_0_6B
    assert [gpu.shares[section].parameters for gpu in found.gpus] == [2 * shape.num_parameters // parts] * 2
    gpus(80e9)
    with pytest.raises(ConfigError, match=f"needs 2 GPUs, the {section} sees 1"):
        planned(run(**{section: {"engine_args": engine_args, **engine}}))


@pytest.mark.parametrize("total", [26 * GIB, 48 * GIB, 80e9])
@pytest.mark.parametrize("options", [{}, {"gpu_memory_utilization": 0.3}, {"kv_cache_gib": 1.0}])
def test_the_cache_of_a_vllm_teacher_holds_the_longest_sequence_that_it_takes(
    total: float, options: dict[str, float], gpus: Any
) -> None:
    """vLLM does not start otherwise, and these models' own 40,960 tokens take 4.7 GB."""
    gpus(total)
    config = run(teacher={"engine": "vllm", **options})
    found = planned(config)
    longest = with_shares(config, "teacher", found).teacher.max_model_len
    assert longest is not None and longest == with_shares(config, "rollout", found).rollout.max_model_len
    room = found.gpus[0].shares["teacher"].kv_cache // 114_688
    assert longest + 1 <= room  # one more, for the token that vLLM samples


def test_a_vllm_teacher_takes_the_length_that_is_set_or_its_models_on_a_gpu_of_its_own(gpus: Any) -> None:
    gpus(80e9, 80e9)
    config = run(teacher={"engine": "vllm", "max_model_len": 5000})
    assert with_shares(config, "teacher", planned(config)).teacher.max_model_len == 5000
    config = run(teacher={"engine": "vllm", "cuda_devices": "1"})
    assert with_shares(config, "teacher", planned(config)).teacher.max_model_len is None


def test_two_gpus_are_planned_each_for_its_roles(gpus: Any) -> None:
    gpus(24 * GIB, 48 * GIB)
    found = planned(run(student={"cuda_devices": UUIDS[1]}, rollout={"tensor_parallel_size": 2}))
    assert [list(gpu.shares) for gpu in found.gpus] == [["rollout", "teacher"], ["rollout", "trainer"]]
    assert found.gpus[0].shares["rollout"].parameters == QWEN3_0_6B.num_parameters  # half of 2 bytes each


@pytest.mark.parametrize(
    ("total", "changes", "advice"),
    [
        (24 * GIB, {"rollout": {"gpu_memory_utilization": 0.9}}, "leave rollout.gpu_memory_utilization = 0.9 out"),
        (24 * GIB, {"rollout": {"kv_cache_gib": 16.0}}, "leave rollout.kv_cache_gib = 16.0 out"),
        (24 * GIB, {"rollout": {"max_model_len": 40_000}}, "leave rollout.max_model_len = 40000 out"),
        (
            24 * GIB,
            {"pipeline": {"tokens_per_micro_batch": 1 << 18}},
            "leave pipeline.tokens_per_micro_batch = 262144 out",
        ),
        (
            21 * GIB,
            {"student": {"gradient_checkpointing": False}},
            "leave student.gradient_checkpointing = False out",
        ),
        (24 * GIB, {"teacher": {"tokens_per_forward": 1 << 20}}, "leave teacher.tokens_per_forward = 1048576 out"),
        (22.5 * GIB, {"teacher": {"dtype": "float32"}}, "set teacher.dtype = bfloat16"),
        (
            20.5 * GIB,
            {"rollout": {"dtype": "float32"}, "teacher": {"dtype": "float32"}},
            "set rollout.dtype = bfloat16 and",
        ),
        (16 * GIB, {}, "give the trainer a GPU of its own with student.cuda_devices"),
        (8 * GIB, APART, "set trainer.num_processes = 2, a GPU each"),
        (8 * GIB, APART | {"student": {"cuda_devices": "0"}}, "set trainer.cpu_offload = true, which is slow"),
        (2 * GIB, APART | {"student": {"cuda_devices": "0"}}, "take a smaller student.model"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_change_that_helps(
    total: float, changes: dict[str, Any], advice: str, gpus: Any
) -> None:
    gpus(total, 80e9)
    with pytest.raises(ConfigError) as error:
        planned(run(**changes))
    message = str(error.value)
    assert advice in message and "\n" not in message
    parts = re.search(r"has ([\d.]+) GiB to use, but needed are at least ([\d.]+) \((.*)\);", message)
    assert parts is not None and float(parts[2]) > float(parts[1])
    assert sum(float(part.split()[1]) for part in parts[3].split(", ")) == pytest.approx(float(parts[2]), abs=0.2)


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(gpus: Any) -> None:
    gpus(80e9)
    with pytest.raises(
        ConfigError, match=rf"^teacher.cuda_devices = '3': there is no GPU 3 here; there are 0 \({UUIDS[0]}\)"
    ):
        planned(run(teacher={"cuda_devices": "3"}))
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel_size needs 2 GPUs, the rollout sees 1"):
        planned(run(rollout={"tensor_parallel_size": 2}))
    with pytest.raises(
        ConfigError, match=r"rollout.tensor_parallel_size times data_parallel_size needs 4 GPUs, the rollout sees 1"
    ):
        planned(run(rollout={"tensor_parallel_size": 2, "data_parallel_size": 2}))


def test_each_engine_of_a_server_has_a_student_of_its_own(gpus: Any) -> None:
    gpus(80e9, 80e9)
    for tensor, data in ((2, 1), (1, 2)):
        found = planned(run(rollout={"tensor_parallel_size": tensor, "data_parallel_size": data}))
        weights = [gpu.shares["rollout"].parameters for gpu in found.gpus]
        assert weights == [2 * QWEN3_0_6B.num_parameters // tensor] * 2
    planned(run(teacher={"cuda_devices": "3"}, teacher_client={"urls": ["http://elsewhere:1"]}), "trainer")


def test_there_is_nothing_to_plan_without_gpus_or_shapes(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(80e9)
    assert plan(run(), shapes={"student": QWEN3_0_6B}.get) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan(run(), shapes=SHAPES.get) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert planned(run(teacher={"device": "cpu"})).gpus[0].shares.keys() == {"rollout", "trainer"}
    install_torch("2.13.0+cpu", monkeypatch)
    assert plan(run(), shapes=SHAPES.get) is None


def test_it_is_said_when_a_share_cannot_be_computed(
    gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(80e9)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # which is asked for 45 s where it is not there
    assert computed(run(), "teacher") == run()  # nobody knows a model "teacher"
    assert "the teacher's share of the GPU is not computed" in caplog.text
    caplog.clear()
    install_torch("2.13.0+cpu", monkeypatch)
    computed(run(), "teacher")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("role", "changes", "environment"),
    [
        ("teacher", {"teacher": {"device": "cpu"}}, None),
        ("trainer", {"student": {"cuda_devices": ""}}, None),
        ("trainer", {}, ""),
    ],
)
def test_nothing_is_said_of_the_gpu_to_a_role_that_uses_none(
    role: str,
    changes: dict[str, Any],
    environment: str | None,
    gpus: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpus(80e9)
    monkeypatch.setattr("services.gpus.sharing.DRIVER_FILE", tmp_path)
    if environment is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    computed(run(**changes), role)
    assert caplog.text == ""


def test_servers_of_which_one_uses_no_gpu_start_together(gpus: Any, tmp_path: Path, monkeypatch: Any) -> None:
    gpus(80e9)
    monkeypatch.setattr("services.gpus.sharing.DRIVER_FILE", tmp_path)
    assert servers_share_a_gpu(run())
    assert not servers_share_a_gpu(run(teacher={"device": "cpu"}))


@pytest.mark.parametrize("devices", ["NoDevFiles", "all", "0,0", "0,"])
def test_the_cpu_build_does_not_read_what_the_environment_says_of_gpus(
    devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch("2.13.0+cpu", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    for role in (*ROLES, None):
        assert plan(run(), role, SHAPES.get) is None


def test_a_gpu_of_its_own_is_advised_where_that_is_enough_alone(gpus: Any) -> None:
    gpus(8 * GIB, 8 * GIB)
    larger = "take a smaller student.model or a larger GPU with student.cuda_devices"
    with pytest.raises(ConfigError, match=rf"{larger}, or spread it over GPUs with trainer.num_processes$"):
        planned(run())
    gpus(14 * GIB, 14 * GIB)
    with pytest.raises(ConfigError, match=r"give the trainer a GPU of its own with student.cuda_devices"):
        planned(run())
    gpus(14 * GIB)  # there is no other
    with pytest.raises(ConfigError, match=r"set trainer.cpu_offload = true, which is slow$"):
        planned(run())


def test_the_table_has_a_line_a_role(gpus: Any) -> None:
    gpus(24 * GIB)
    found = planned(run())
    head, *rows = found.lines()
    assert head.startswith("GPU 0, 24.0 GiB") and head.split()[-2:] == ["GiB,", "computed"]
    assert [row.split()[0] for row in rows] == ["rollout", "teacher", "trainer"]
    totals = [float(row.split()[-1]) for row in rows]
    assert sum(totals) == pytest.approx(found.gpus[0].needed / GIB, abs=0.2)


@pytest.mark.parametrize(
    ("rollout", "teacher", "expected"),
    [(None, None, True), ("0", "1", False), ("0", UUIDS[0], True), ("0", UUIDS[1][:8], False), ("1", None, False)],
)
def test_servers_that_share_a_gpu_are_told_from_others(
    rollout: str | None, teacher: str | None, expected: bool, gpus: Any
) -> None:
    gpus(80e9, 80e9)
    assert servers_share_a_gpu(run(rollout={"cuda_devices": rollout}, teacher={"cuda_devices": teacher})) is expected


def test_without_nvidia_smi_servers_share_unless_their_lists_lie_apart(
    gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus()
    monkeypatch.setattr("services.gpus.sharing.DRIVER_FILE", tmp_path)
    for devices, expected in ((("0", "1"), False), (("0", "GPU-12"), True), ((None, "1"), True), (("", "1"), False)):
        config = run(rollout={"cuda_devices": devices[0]}, teacher={"cuda_devices": devices[1]})
        assert servers_share_a_gpu(config) is expected
    install_torch("2.13.0+cpu", monkeypatch)
    assert not servers_share_a_gpu(run())


NCCL = {"weight_sync": {"backend": "nccl"}}


@pytest.mark.parametrize(
    ("student", "rollout", "shared"),
    [("0", UUIDS[0], True), ("0", UUIDS[0][:10], True), (None, None, True), (None, "0", True), ("1", None, False)],
)
def test_nccl_on_one_card_is_refused_by_uuid(student: str | None, rollout: str | None, shared: bool, gpus: Any) -> None:
    gpus(80e9, 80e9)
    config = run(student={"cuda_devices": student}, rollout={"cuda_devices": rollout}, **NCCL)
    if not shared:
        check_nccl(config)
        return
    with pytest.raises(ConfigError, match=r"share a GPU; give student.cuda_devices and rollout.cuda_devices different"):
        check_nccl(config)


def test_nccl_needs_gpus_on_this_machine_under_up_alone(gpus: Any) -> None:
    gpus()
    with pytest.raises(ConfigError, match="nccl needs a GPU for the trainer and one for the rollout server"):
        check_nccl(run(**NCCL))
    check_nccl(run(**NCCL), "trainer")  # the other is on another machine
    gpus(80e9)
    check_nccl(run(**NCCL), "trainer")  # and so is its GPU 0
    devices = {"student": {"cuda_devices": "0"}, "rollout": {"cuda_devices": UUIDS[0]}}
    with pytest.raises(ConfigError, match="share a GPU"):
        check_nccl(run(**devices, **NCCL), "trainer")
    check_nccl(run(**devices, **NCCL), "teacher")  # no weights are pushed to it
