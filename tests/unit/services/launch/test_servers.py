"""The servers that `up` starts: ports, URLs, and what each of several rollout servers reads."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from services.config import RunConfig
from services.errors import ConfigError
from services.gpus import cards
from services.gpus.advice import updated
from services.gpus.cards import Gpu
from services.launch import servers
from services.launch.servers import refuse_urls, rollout_runs, with_free_ports
from tests.unit.services.fake_gpus import install_torch


@contextmanager
def ports_of(config: RunConfig) -> Iterator[RunConfig]:
    """The run with ports, which are free again after the block."""
    moved, reservations = with_free_ports(config)
    try:
        yield moved
    finally:
        for reservation in reservations:
            reservation.release()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """Six GPUs, and torch built for them."""
    found = [Gpu(index, f"GPU-{index}", 80 << 30) for index in range(6)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install_torch("2.13.0", monkeypatch)
    monkeypatch.setattr(cards, "installed_gpus", lambda: tuple(found))
    return found


def test_taken_ports_are_replaced(config: RunConfig) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        busy = config.model_copy(update={"rollout": config.rollout.model_copy(update={"port": port})})
        moved, reservations = with_free_ports(busy)
    assert moved.rollout.port not in (port, moved.teacher.port)
    assert moved.rollout_urls() == [f"http://127.0.0.1:{moved.rollout.port}"]
    assert [reservation.port for reservation in reservations] == [moved.rollout.port, moved.teacher.port]


def test_two_runs_that_choose_ports_at_once_never_get_the_same(config: RunConfig) -> None:
    """Nobody listens yet, so a bind alone would tell both that the port is free."""
    first, held = with_free_ports(config)
    second, _ = with_free_ports(config)
    assert len({first.rollout.port, first.teacher.port, second.rollout.port, second.teacher.port}) == 4
    for reservation in held:
        reservation.release()
    assert with_free_ports(config)[0].rollout.port == config.rollout.port


@pytest.mark.parametrize("role", ["rollout", "teacher"])
def test_urls_of_servers_that_run_elsewhere_are_refused(role: str, config: RunConfig) -> None:
    section = getattr(config, f"{role}_client").model_copy(update={"urls": ["http://10.0.0.5:8100"]})
    with pytest.raises(ConfigError, match=rf"{role}_client\.urls = .*10\.0\.0\.5.*distillserve train"):
        refuse_urls(config.model_copy(update={f"{role}_client": section}))


def test_a_teacher_that_others_start_is_refused_even_at_our_own_url(config: RunConfig) -> None:
    section = config.teacher_client.model_copy(update={"protocol": "vllm", "urls": config.teacher_urls()})
    with pytest.raises(ConfigError, match=r"teacher_client\.protocol = vllm .* attach with `distillserve train`"):
        refuse_urls(config.model_copy(update={"teacher_client": section}))


def test_a_run_file_that_up_wrote_can_be_run_again(config: RunConfig) -> None:
    written, held = with_free_ports(config)
    for reservation in held:
        reservation.release()
    refuse_urls(written)
    again, _ = with_free_ports(written)
    assert again.rollout_urls() == [f"http://127.0.0.1:{again.rollout.port}"]


def test_several_rollout_servers_get_the_ports_after_the_first_but_not_the_teachers(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {8103}

    def reserve(section: str, host: str, preferred: int) -> SimpleNamespace:
        port = next(port for port in (preferred, *range(40000, 41000)) if port not in taken)
        taken.add(port)
        return SimpleNamespace(port=port)

    monkeypatch.setattr(servers, "reserve_port", reserve)
    wanted = updated(updated(config, "rollout", num_servers=4, port=8100), "teacher", port=8101)
    moved, reservations = with_free_ports(wanted)
    ports = [8100, 8102, 40000, 8104]
    assert moved.rollout.port == 8100 and moved.teacher_urls() == ["http://127.0.0.1:8101"]
    assert moved.rollout_urls() == [f"http://127.0.0.1:{port}" for port in ports]
    assert [run.rollout.port for run in rollout_runs(moved)] == ports
    assert sorted(reservation.port for reservation in reservations) == sorted([*ports, 8101])


def test_beyond_the_last_port_any_free_one_is_taken(config: RunConfig) -> None:
    with ports_of(updated(config, "rollout", num_servers=2, port=65535)) as moved:
        assert len(set(moved.rollout_urls())) == 2


def test_a_run_file_with_several_servers_that_up_wrote_can_be_run_again(config: RunConfig) -> None:
    with ports_of(updated(config, "rollout", num_servers=2)) as written:
        refuse_urls(written)
    ours, theirs = written.rollout_urls()
    for urls in ([theirs, ours], [ours], [ours, "http://10.0.0.5:8100"], [ours, theirs.replace("http:", "https:")]):
        with pytest.raises(ConfigError, match=r"rollout_client\.urls = .* leave rollout_client\.urls out"):
            refuse_urls(updated(written, "rollout_client", urls=urls))
    with pytest.raises(ConfigError, match=r"rollout_client\.urls"):
        refuse_urls(updated(written, "rollout", num_servers=1))


def test_one_rollout_server_reads_the_run_as_it_is(config: RunConfig) -> None:
    with ports_of(config) as moved:
        assert rollout_runs(moved) == [moved]


def devices_of(config: RunConfig) -> list[str | None]:
    with ports_of(config) as moved:
        return [run.rollout.cuda_devices for run in rollout_runs(moved)]


@pytest.mark.usefixtures("gpus")
def test_each_rollout_server_has_gpus_of_its_own(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of(updated(config, "rollout", num_servers=3)) == ["0", "1", "2"]
    pairs = updated(config, "rollout", num_servers=2, tensor_parallel_size=2)
    assert devices_of(pairs) == ["0,1", "2,3"]
    assert devices_of(updated(pairs, "rollout", cuda_devices="5,4,3,2,1")) == ["5,4", "3,2"]
    assert devices_of(updated(config, "rollout", num_servers=2, engine_args=["-pp", "3"])) == ["0,1,2", "3,4,5"]
    assert devices_of(updated(config, "rollout", num_servers=2, data_parallel_size=2)) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,2")
    assert devices_of(updated(config, "rollout", num_servers=2)) == ["4", "2"]


@pytest.mark.usefixtures("gpus")
def test_too_few_gpus_are_refused_in_one_line(config: RunConfig) -> None:
    few = updated(config, "rollout", num_servers=2, tensor_parallel_size=2, cuda_devices="0,1,2")
    with pytest.raises(
        ConfigError, match=r"^rollout\.num_servers = 2 with 2 GPUs each needs 4 GPUs, .*3.*'0,1,2'.*lower it$"
    ):
        devices_of(few)
    with pytest.raises(ConfigError, match=r"^rollout\.num_servers = 7 with 1 GPU each needs 7 GPUs, but there are 6"):
        devices_of(updated(config, "rollout", num_servers=7))


def test_gpus_that_nvidia_smi_does_not_know_are_counted(
    gpus: list[Gpu], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.clear()
    monkeypatch.setattr(servers, "may_use_a_gpu", lambda *_: True)
    assert devices_of(updated(config, "rollout", num_servers=2)) == ["0", "1"]


def test_without_a_gpu_there_is_nothing_to_share_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch("2.13.0+cpu", monkeypatch)
    assert devices_of(updated(config, "rollout", num_servers=2)) == [None, None]
    assert devices_of(updated(config, "rollout", num_servers=2, cuda_devices="")) == ["", ""]


@pytest.mark.usefixtures("gpus")
def test_all_rollout_servers_of_a_run_use_the_backend_of_its_trainer(config: RunConfig) -> None:
    """The second server alone shares no GPU with the trainer, which pushes to both over gloo."""
    shared = updated(updated(config, "rollout", num_servers=2, cuda_devices="0,1"), "student", cuda_devices="0")
    with ports_of(shared) as moved:
        assert [run.weight_sync_backend() for run in (moved, *rollout_runs(moved))] == ["gloo"] * 3
    with ports_of(updated(shared, "student", cuda_devices="2")) as moved:
        assert [run.weight_sync_backend() for run in (moved, *rollout_runs(moved))] == ["nccl"] * 3


def test_rollout_servers_draw_different_samples_and_are_one_server_each(config: RunConfig) -> None:
    with ports_of(updated(config, "rollout", num_servers=2, seed=5)) as moved:
        runs = rollout_runs(moved)
        assert [run.rollout.seed for run in runs] == [5, 6] and [run.rollout.num_servers for run in runs] == [1, 1]
        assert all(run.rollout_urls() == moved.rollout_urls() for run in runs)
