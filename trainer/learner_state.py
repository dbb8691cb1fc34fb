"""What a learner needs besides the student's weights to go on as if it had never ended: the optimizer's state, the course of the
learning rate, and the random generators.

Of each of the optimizer's tensors a rank keeps the part that it holds, so that any number of ranks can go on from it. Plain
values are the same on all ranks; those of rank 0 are kept. Only torch's generators decide what is trained: Python's own is used
for waiting times alone, and the order of the data is of its seed.
"""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from services.errors import ConfigError, StartupError
from trainer.checkpoint.block import Block
from trainer.checkpoint.plain_values import NotPlainError, from_json, to_json
from trainer.checkpoint.rank_file import RankFiles
from trainer.parallel import block_of, is_first_holder, local, spread_like
from trainer.ranks.group import Ranks

logger = logging.getLogger(__name__)

_FIX = "give another optimizer, or go without checkpoints: output.save_every_steps = 0"


@dataclass(frozen=True)
class RankState:
    """What one rank writes.

    Attributes:
        tensors: copies in host memory, by name; those that another rank of a smaller number holds as well are left out.
        blocks: of each of them.
        values: what is no tensor, as JSON; the same on all ranks.
    """

    tensors: dict[str, Tensor]
    blocks: dict[str, Block]
    values: dict[str, Any]


def capture(
    student: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ranks: Ranks,
    generators: dict[str, Tensor],
) -> RankState:
    """A copy of all of it; a step may follow at once.

    Args:
        generators: of `generators`, after the last finished step.

    Raises:
        ConfigError: of the optimizer or the schedule a checkpoint cannot hold everything; says what.
    """
    tensors, blocks = {}, {}
    for name, parameter, held in _tensors(student, optimizer):
        is_like, whose = held.shape == parameter.shape, held if isinstance(held, DTensor) else parameter
        if is_first_holder(whose, ranks) if is_like else ranks.index == 0:
            tensors[name] = local(held.detach()).to("cpu", copy=True)
            blocks[name] = block_of(held)
    for name, state in generators.items():
        tensors[name], blocks[name] = state, Block.all_of(tuple(state.shape))
    return RankState(tensors, blocks, describe(student, optimizer, schedule))


def describe(student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    """What is no tensor, as JSON, and what tensors there are.

    Raises:
        ConfigError: as of `capture`.
    """
    named = {id(parameter): name for name, parameter in student.named_parameters()}
    groups: list[dict[str, Any]] = []
    state: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        what = f"param_groups[{index}]"
        options = {
            _key(what, key, optimizer): _plain(f"{what}[{key!r}]", value, optimizer)
            for key, value in group.items()
            if key != "params"
        }
        groups.append(options | {"params": [named[id(parameter)] for parameter in group["params"]]})
    for parameter, values in optimizer.state.items():
        if id(parameter) not in named:
            raise ConfigError(f"the optimizer {_named(optimizer)} has state of no parameter, {parameter!r}; {_FIX}")
        name = named[id(parameter)]
        what = f"state[{name!r}]"
        state[name] = {
            _key(what, key, optimizer): _described(f"{what}[{key!r}]", value, parameter, optimizer)
            for key, value in values.items()
        }
    if extra := set(optimizer.state_dict()) - {"state", "param_groups"}:
        raise ConfigError(f"the optimizer {_named(optimizer)} has a state of its own, {sorted(extra)}; {_FIX}")
    return {
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "state": state,
        "schedule": _plain("state", schedule.state_dict(), schedule),
    }


def restore(
    student: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    ranks: Ranks,
    files: RankFiles,
    values: dict[str, Any],
    *,
    is_longer: bool,
) -> None:
    """Inverse of `capture`, on any number of ranks.

    Args:
        schedule: as it begins.
        is_longer: the run has another number of steps than before: the schedule is let through those that are done.

    Raises:
        StartupError: it is of another student or optimizer; names the first difference.
    """
    parameters = dict(student.named_parameters())
    first_rates = [group["lr"] for group in optimizer.param_groups]
    _restore_groups(optimizer, parameters, values)
    optimizer.state.clear()
    for name, entries in values["state"].items():
        restored = {}
        for key, entry in entries.items():
            if "value" in entry:
                restored[key] = from_json(entry["value"])
            else:
                restored[key] = _read(files, f"optimizer/{name}/{key}", parameters[name], entry)
        optimizer.state[parameters[name]] = restored
    before = from_json(values["schedule"])
    if not is_longer:
        schedule.load_state_dict(before)
        return
    for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
        group["lr"] = rate
    with warnings.catch_warnings(action="ignore"):  # the optimizer's own steps are not made again
        for _ in range(before["last_epoch"]):
            schedule.step()


def restore_generators(ranks: Ranks, files: RankFiles, num_ranks: int, seed: int, step: int) -> None:
    """Let torch's generators go on.

    Args:
        num_ranks: that wrote the files; on another number every rank gets a seed of its own.
    """
    if num_ranks != ranks.count or not all(files.has(name) for name in generators(ranks)):
        logger.debug("rank %d of %d, after %d ranks: its generators begin anew", ranks.index, ranks.count, num_ranks)
        torch.manual_seed(hash((seed, step, ranks.index)))
        return
    torch.set_rng_state(files.read(f"rng/{ranks.index}/cpu"))
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(files.read(f"rng/{ranks.index}/cuda"), ranks.device)


def generators(ranks: Ranks) -> dict[str, Tensor]:
    """The states of torch's generators that this rank uses."""
    states = {f"rng/{ranks.index}/cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"rng/{ranks.index}/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _tensors(student: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter, tensor) of the optimizer's state."""
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{key}", parameter, value


def _described(what: str, value: Any, parameter: Tensor, optimizer: Optimizer) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"value": _plain(what, value, optimizer)}
    if value.shape == parameter.shape:
        if isinstance(value, DTensor) != isinstance(parameter, DTensor):
            raise ConfigError(
                f"the optimizer {_named(optimizer)}: {what} is not spread over the ranks as its parameter is; {_FIX}"
            )
        return {"like": "parameter", "device": "parameter"}
    if isinstance(parameter, DTensor) and (isinstance(value, DTensor) or value.numel() > 1):
        raise ConfigError(
            f"the optimizer {_named(optimizer)}: {what} has shape {list(value.shape)}, its parameter, which is spread over ranks, "
            f"{list(parameter.shape)}; {_FIX}"
        )
    is_beside = value.device == local(parameter).device
    return {"like": "itself", "device": "parameter" if is_beside else "cpu"}


def _read(files: RankFiles, name: str, parameter: Tensor, entry: dict[str, Any]) -> Tensor:
    device = local(parameter).device if entry["device"] == "parameter" else torch.device("cpu")
    if entry["like"] == "itself":
        return files.read(name).to(device)
    return spread_like(files.read(name, block_of(parameter)).to(device), parameter)


def _restore_groups(optimizer: Optimizer, parameters: dict[str, nn.Parameter], values: dict[str, Any]) -> None:
    ours, named = optimizer.param_groups, {id(parameter): name for name, parameter in parameters.items()}
    if values["optimizer"] != type(optimizer).__name__:
        raise StartupError(
            f"the checkpoint is of the optimizer {values['optimizer']}, this run has {_named(optimizer)}"
        )
    found = [[named[id(p)] for p in group["params"]] for group in ours]
    for mine, theirs in zip(found, [group["params"] for group in values["groups"]], strict=False):
        if different := sorted(set(mine) ^ set(theirs)):
            raise StartupError(f"the checkpoint and this run do not train the same parameters: {different[0]}")
        if mine != theirs:
            raise StartupError("the checkpoint's optimizer has the parameters in another order")
    if len(ours) != len(values["groups"]):
        raise StartupError(
            f"the checkpoint's optimizer has {len(values['groups'])} groups of parameters, this run's {len(ours)}"
        )
    for group, saved in zip(ours, values["groups"], strict=True):
        group.update({key: from_json(value) for key, value in saved.items() if key != "params"})


def _key(what: str, key: Any, optimizer: Optimizer) -> str:
    if not isinstance(key, str):
        raise ConfigError(
            f"the optimizer {_named(optimizer)} cannot be resumed: its {what} has the key {key!r}, and a checkpoint holds texts as "
            f"keys; {_FIX}"
        )
    return key


def _plain(what: str, value: Any, owner: Optimizer | LRScheduler) -> Any:
    try:
        return to_json(value)
    except NotPlainError as error:
        kind = "optimizer" if isinstance(owner, Optimizer) else "schedule"
        raise ConfigError(
            f"the {kind} {_named(owner)} cannot be resumed: its {what} is or holds {error}, which a checkpoint cannot hold; {_FIX}"
        ) from error


def _named(owner: Any) -> str:
    return type(owner).__name__
