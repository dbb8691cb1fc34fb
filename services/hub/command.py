"""`distillserve push`: its options, and what it says. Loads what the hub needs when it runs."""

import argparse
from pathlib import Path

from services.errors import ConfigError
from services.process.streams import say, writing_stdout

EXAMPLES = """examples:
  distillserve push outputs/run --repo me/my-student
  distillserve push outputs/run --repo me/my-student --private --dtype bfloat16 --revision v1
  distillserve push outputs/run --repo me/my-adapter --what adapter
  distillserve push outputs/run --repo me/my-student --step 200 --dry-run

The hub is https://huggingface.co, or what HF_ENDPOINT names. The token is that of HF_TOKEN or of `hf auth login`."""

# A hub that says nothing for as long is not waited for; a commit of a large model takes it a minute.
_CONNECT_S, _SILENCE_S = 20.0, 300.0


def add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN_FOLDER", help="output.dir of a run that has ended")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where it goes; created if it is not there")
    parser.add_argument(
        "--what",
        choices=("merged", "adapter"),
        default="merged",
        help="the whole model, or the adapter of a run with a [lora] section (default: %(default)s)",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="the student of checkpoints/step-N (default: the last one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights on the way, which needs room for the copy (default: as they were saved)",
    )
    parser.add_argument(
        "--private", action="store_true", help="nobody else sees the repository; a public one that is there is refused"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="created from main if it is not there (default: main)")
    parser.add_argument(
        "--commit-message", metavar="TEXT", help="default: what was uploaded, and the name of the run's folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the files and the model card, and send nothing")


def push(arguments: argparse.Namespace) -> int:
    from services.hub.push import locked_plan, push_to_hub
    from services.hub.repository import set_timeouts
    from services.hub.upload import CARD

    run = Path(arguments.run_folder)
    options = {name: getattr(arguments, name) for name in ("what", "step", "dtype", "revision")}
    if arguments.commit_message is not None and not arguments.commit_message.strip():
        raise ConfigError("--commit-message is empty; leave it out, or say what is uploaded")
    if arguments.dry_run:
        with locked_plan(run, arguments.repo, **options) as upload, writing_stdout():
            for name, size in upload.sizes().items():
                print(f"{size:>14,} {name}")
            card = upload.files[CARD]
            assert isinstance(card, bytes)
            print(f"\n{card.decode()}")
        return 0
    set_timeouts(_CONNECT_S, _SILENCE_S)
    url = push_to_hub(
        run,
        arguments.repo,
        private=arguments.private,
        commit_message=arguments.commit_message,
        on_progress=say,
        **options,
    )
    say(url)
    return 0
