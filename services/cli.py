"""The `distillserve` command: one subcommand per role, with the options that it reads.

The options of a run, its file and their checks are services/config.
Role code is imported when its command runs, so that --help answers at once.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic_settings import CliSettingsSource

from services.config import RunConfig
from services.config.addresses import checked_urls
from services.config.command_line import add_options, load_config, unknown_arguments
from services.config.roles import Role
from services.errors import ERROR_PREFIX, ConfigError, DistillServeError
from services.gpus.cards import check_granted, keep_segments_expandable, make_visible
from services.hub.command import EXAMPLES as PUSH_EXAMPLES
from services.hub.command import add_push_options, push
from services.logs import set_up_logging
from services.process.signals import Interrupted, handling, raise_interrupted
from services.process.streams import give_up_unwritten, say, set_up_streams, writing_stdout

_EXAMPLES = {
    "up": """examples:
  distillserve up deploy/runs/tiny.toml
  distillserve up deploy/runs/tiny.toml --verbose
  distillserve up deploy/runs/tiny.toml --student.model ./my-student --teacher.model ./my-teacher --data.path my.jsonl""",
    "rollout": """examples:
  distillserve rollout run.toml
  distillserve rollout --student.model Qwen/Qwen3-0.6B --rollout.port 8100 --rollout.dtype bfloat16""",
    "teacher": """examples:
  distillserve teacher run.toml
  distillserve teacher --teacher.model Qwen/Qwen3-1.7B --teacher.port 8101""",
    "train": """examples:
  distillserve train run.toml
  distillserve train run.toml --loss.gamma 0.95 --rollout_client.urls '["http://10.0.0.5:8100"]'""",
    "tiny": """examples:
  distillserve tiny
  distillserve tiny --output outputs/tiny-pair --seed 1""",
    "score": """examples:
  distillserve score "2+2=" "4" --url http://127.0.0.1:8101
  distillserve score --input data.jsonl --output scores/ --top-k 32 --temperature 1.0
  distillserve score --input data.jsonl --output scores/ --url http://10.0.0.5:8101 --url http://10.0.0.6:8101

A row of the input is {"prompt", "completion"} (texts or lists of messages), {"messages"} (maybe with "tools") or
{"token_ids", "prompt_length"}. A run that ended early is
finished by the same command; services.score.command.read_shards reads the folder. The key is DISTILLSERVE_TEACHER_KEY.""",
    "push": PUSH_EXAMPLES,
}
_SUMMARIES = {
    "up": "start rollout server, teacher server and trainer on this machine",
    "rollout": "start the rollout server (vLLM)",
    "teacher": "start the teacher server",
    "train": "train against running servers",
    "score": "score one completion, or a JSONL file of them, with a teacher server",
    "push": "upload the student of a run to a model hub, with a model card",
    "tiny": "build the tiny teacher and student that `make train` uses",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, a DistillServeError's code, or 128 + the signal that ended it."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_streams()
    try:
        with handling(raise_interrupted, signal.SIGTERM):
            code = _dispatch(argv)
    except DistillServeError as error:
        _say_error(error)
        code = error.exit_code
    except Interrupted as error:
        _say_error(error)
        code = 128 + error.number
    except KeyboardInterrupt:
        print(f"{ERROR_PREFIX}interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output is gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    give_up_unwritten()
    _leave(code)


def _say_error(error: BaseException) -> None:
    """One line that says why, and one that says how to go on where that is known."""
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """As sys.exit; of several ranks without torch's own end of their group, which now and then aborts, or waits for one that
    is gone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Parser(argparse.ArgumentParser):
    """Bad usage as the one line that every other error is, instead of the usage with its hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows what is possible")


class _Version(argparse.Action):
    """Unlike argparse's own, it looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        with writing_stdout():
            print(f"distillserve {version('distillserve')}")
        parser.exit()


def _dispatch(argv: list[str]) -> int:
    parser = _Parser(
        prog="distillserve",
        description="On-policy distillation: vLLM rollouts, a teacher over HTTP, the MiniLLM loss, weights pushed back.",
        epilog="`distillserve COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the asked command gets its hundred options: building all of them costs a noticeable part of a second.
    asked = next((word for word in argv if not word.startswith("-")), None)
    source: CliSettingsSource[Any] | None = None
    for name, summary in _SUMMARIES.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=_EXAMPLES[name],
            usage=None if name in _PLAIN_COMMANDS else f"distillserve {name} [RUN] [OPTIONS]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in _PLAIN_COMMANDS:
            _PLAIN_COMMANDS[name][0](command)
        else:
            command.add_argument(
                "run_file", nargs="?", metavar="RUN", help="TOML or JSON file with the options of the run"
            )
            command.add_argument("--dry-run", action="store_true", help="print the resolved options and exit")
            if name in ("up", "train"):
                command.add_argument(
                    "--resume",
                    action="store_const",
                    const="true",
                    help="go on from the newest checkpoint in output.dir, or refuse to start (--output.resume true)",
                )
            if name == "up":
                command.add_argument("--verbose", action="store_true", help="show all that the roles say")
            if name == asked:
                source = add_options(command, cast(Role, name))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and arguments.command in _PLAIN_COMMANDS:
        raise ConfigError(f"{unknown[0]} is not an option; `distillserve {arguments.command} --help` lists them")
    if unknown:
        raise ConfigError(unknown_arguments(unknown, arguments.command))
    set_up_logging()
    if arguments.command in _PLAIN_COMMANDS:
        return _PLAIN_COMMANDS[arguments.command][1](arguments)
    assert source is not None
    options = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    if getattr(arguments, "resume", None) is not None:
        options["output.resume"] = arguments.resume
    config = load_config(arguments.command, arguments.run_file, source, options)
    if arguments.dry_run:
        with writing_stdout():
            print(config.model_dump_json(indent=2))
        return 0
    config.require(arguments.command)
    _choose_gpus(arguments.command, config)
    if arguments.command == "up":
        return _up(config, arguments.verbose)
    return _COMMANDS[arguments.command](config)


def _choose_gpus(command: str, config: RunConfig) -> None:
    """Let the process of a role see its GPUs alone, before torch is loaded; `up` checks what its children will do."""
    devices = {
        "rollout": ("rollout.cuda_devices", config.rollout.cuda_devices),
        "teacher": ("teacher.cuda_devices", config.teacher.cuda_devices),
        "train": ("student.cuda_devices", config.student.cuda_devices),
    }
    if command == "up":
        for option in devices.values():
            check_granted(*option)
        return
    make_visible(*devices[command])
    if command == "train" or (command == "teacher" and config.teacher.engine == "transformers"):
        keep_segments_expandable()


_NO_OPTIONS = ("command", "run_file", "dry_run", "verbose", "resume")
"""What the parsed command line holds besides options of the run."""


def _up(config: RunConfig, verbose: bool) -> int:
    from services.launch.supervisor import up

    return up(config, verbose=verbose)


def _rollout(config: RunConfig) -> int:
    from services.rollout.server import run

    run(config)
    return 0


def _teacher(config: RunConfig) -> int:
    from services.teacher.server import run

    run(config)
    return 0


def _train(config: RunConfig) -> int:
    from trainer.train import train

    train(config)
    return 0


_COMMANDS: dict[str, Callable[[RunConfig], int]] = {
    "rollout": _rollout,
    "teacher": _teacher,
    "train": _train,
}


def _add_tiny_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="outputs/tiny-pair", metavar="DIR", help="folder of the pair (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data, initialisation and training (default: %(default)s)"
    )


def _tiny(arguments: argparse.Namespace) -> int:
    say(f"tiny pair of models: in {arguments.output}, built unless it is there (usually 1 to 2 min)")
    from transformers.utils.logging import disable_progress_bar

    from trainer.tiny.pair import build_tiny_pair

    disable_progress_bar()
    build_tiny_pair(Path(arguments.output), seed=arguments.seed, on_progress=say)
    return 0


_FILE_ONLY = {"output": None, "logprob_dtype": "float32", "shard_rows": 1024, "on_bad_row": "stop"}
"""Options of `distillserve score --input`, and their defaults."""


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    pair = parser.add_argument_group("one completion")
    pair.add_argument("prompt", nargs="?", metavar="PROMPT", help="text that is not scored")
    pair.add_argument("completion", nargs="?", metavar="COMPLETION", help="text that is scored, token by token")
    file = parser.add_argument_group("a file")
    file.add_argument("--input", metavar="FILE", help="JSONL file, a row to score a line")
    file.add_argument("--output", metavar="DIR", help="folder of the shards and their manifest")
    file.add_argument(
        "--logprob-dtype", choices=("float32", "float16"), help="dtype of stored logprobs (default: float32)"
    )
    file.add_argument(
        "--shard-rows", type=_positive_int, metavar="N", help="lines of the input per shard (default: 1024)"
    )
    file.add_argument(
        "--on-bad-row", choices=("stop", "skip"), help="skip: leave bad rows out and list them (default: stop)"
    )
    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help="teacher server, once per replica (default: http://127.0.0.1:8101)",
    )
    teacher.add_argument(
        "--top-k", type=_positive_int, default=5, metavar="K", help="candidates per token (default: %(default)s)"
    )
    teacher.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divides the logits, 0.01 to 100 (default: %(default)s)",
    )
    teacher.add_argument(
        "--outage-s",
        type=float,
        default=60.0,
        metavar="S",
        help="how long to go on asking while no teacher answers, seconds (default: %(default)s)",
    )
    teacher.add_argument(
        "--timeout-s",
        type=float,
        default=300.0,
        metavar="S",
        help="how long to wait for the answer to one request, seconds (default: %(default)s)",
    )


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _score(arguments: argparse.Namespace) -> int:
    from services.score.command import FileOptions, TeacherOptions, score_file, score_pair

    if not 0.01 <= arguments.temperature <= 100:
        raise ConfigError(f"--temperature = {arguments.temperature} must be between 0.01 and 100")
    for option, seconds in (("--outage-s", arguments.outage_s), ("--timeout-s", arguments.timeout_s)):
        if not seconds > 0:
            raise ConfigError(f"{option} = {seconds} must be above 0")
    try:
        urls = checked_urls("--url", arguments.url or ["http://127.0.0.1:8101"], base_path=True)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    teacher = TeacherOptions(
        urls, arguments.top_k, arguments.temperature, outage_s=arguments.outage_s, timeout_s=arguments.timeout_s
    )
    given = {name: getattr(arguments, name) for name in _FILE_ONLY if getattr(arguments, name) is not None}
    if arguments.input is None:
        if arguments.prompt is None or arguments.completion is None:
            raise ConfigError(
                "give PROMPT and COMPLETION, or --input FILE --output DIR; see `distillserve score --help`"
            )
        if given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')} belongs to --input, which is not given")
        asyncio.run(score_pair(teacher, arguments.prompt, arguments.completion))
        return 0
    if arguments.prompt is not None:
        raise ConfigError(f"PROMPT = {arguments.prompt!r} and --input = {arguments.input} exclude each other; give one")
    if "output" not in given:
        raise ConfigError("--output DIR is required with --input; the scores go there")
    options = {**_FILE_ONLY, **given, "input": Path(arguments.input), "output": Path(arguments.output)}
    asyncio.run(score_file(teacher, FileOptions(**options)))
    return 0


_PLAIN_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "score": (_add_score_options, _score),
    "push": (add_push_options, push),
    "tiny": (_add_tiny_options, _tiny),
}
"""Commands without a run file: their options, and what they do."""


if __name__ == "__main__":
    main()
