"""`make mutants`: change one operator, number or return at a time, and see whether a test notices.

Works on a copy of the project in a temporary folder. A test process is forked for each change from one that has imported
the large libraries. Writes build/mutants/MODULE.json: how many changes were tried and found, and those that no test saw.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = ("services", "trainer", "tests")
LIBRARIES = ("torch", "transformers", "pytest", "hypothesis", "httpx", "pydantic_settings", "accelerate")
_NOT_COPIED = (".*", "__pycache__", "build", "outputs")

MODULES = {
    "staleness_buffer": ("trainer/staleness_buffer.py", ["test_staleness_buffer"]),
    "batch": ("trainer/batch.py", ["test_batch", "test_loss_from_rows"]),
    "rollouts": ("trainer/rollouts.py", ["test_rollouts"]),
    "scoring": ("trainer/scoring.py", ["test_scoring"]),
    "pipeline": ("trainer/pipeline.py", ["test_train", "test_ways_out"]),
    "teacher_scores": ("trainer/teacher_scores.py", ["test_teacher_scores", "test_teacher_faults"]),
    "weight_sync": ("trainer/weights/weight_sync.py", ["weights/test_weight_sync"]),
    "evaluate": ("trainer/evaluation/evaluate.py", ["evaluation/test_evaluate"]),
}
"""By name: the file that is changed, and the tests of tests/unit/trainer that are to notice."""

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
}
_NOT_RUN = ("annotation", "returns", "decorator_list")


def mutants(source: str) -> Iterator[tuple[dict[str, object], str]]:
    """Every module that is `source` but for one change: where and what that is, and the module's source."""
    for index, node in enumerate(_running(ast.parse(source))):
        tree = ast.parse(source)
        changed = list(_running(tree))[index]
        if _change(changed):
            what = {"line": getattr(node, "lineno", 0), "before": ast.unparse(node), "after": ast.unparse(changed)}
            yield what, ast.unparse(tree)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that do something when the module is used."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in _NOT_RUN:
                yield from _running(child)


def _change(node: ast.AST) -> bool:
    """Whether the node is one that is changed; it is, then."""
    changed: Any = node
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _SWAPPED:
            changed.ops[0] = _SWAPPED[type(op)]()
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPPED:
            changed.op = _SWAPPED[type(op)]()
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            changed.value = changed.value + 1
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.BoolOp):
            node.test = test.operand if isinstance(test, ast.UnaryOp) else ast.UnaryOp(ast.Not(), test)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            node.value = ast.Constant(None)
        case ast.Expr(value=ast.Call() | ast.Await()):
            node.value = ast.Constant(None)
        case _:
            return False
    return True


def exit_code(folder: Path, tests: list[str], timeout_s: float) -> int:
    """pytest's, of a process of its own that is killed after a time, which counts as a failure."""
    if (child := os.fork()) == 0:
        os.setsid()
        os.chdir(folder)
        sink = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1), os.dup2(sink, 2)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        pytest = importlib.import_module("pytest")
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    deadline = time.monotonic() + timeout_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def measure(name: str, folder: Path, seconds: float) -> dict[str, object]:
    """Try the mutants of a module in random order, as far as the time goes."""
    path, tests = folder / MODULES[name][0], [f"tests/unit/trainer/{test}.py" for test in MODULES[name][1]]
    source, started = path.read_text(), time.monotonic()
    if exit_code(folder, tests, 600.0) != 0:
        said = (folder / "said").read_text()[-3000:]
        raise SystemExit(f"mutants: the tests of {name} fail without a change:\n{said}")
    patience = 20.0 + 5.0 * (time.monotonic() - started)
    everything, survivors, num_tried = list(mutants(source)), [], 0
    for what, changed in random.Random(0).sample(everything, len(everything)):
        if time.monotonic() - started > seconds:
            break
        path.write_text(changed)
        num_tried += 1
        if exit_code(folder, tests, patience) == 0:
            survivors.append(what)
    path.write_text(source)
    rate = round(1.0 - len(survivors) / max(1, num_tried), 4)
    counts = {"mutants": len(everything), "tried": num_tried, "found": rate}
    return {"module": MODULES[name][0], **counts, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="which changes do the tests notice?")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}; default: all of them")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all modules together (60)")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(MODULES)):
        parser.error(f"no module named {', '.join(unknown)}; there are {', '.join(MODULES)}")
    names = options.names or list(MODULES)
    sys.dont_write_bytecode, os.environ["OMP_NUM_THREADS"] = True, "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    (into := ROOT / "build" / "mutants").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        for name in names:
            report = measure(name, folder, 60.0 * options.minutes / len(names))
            (into / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
            print(f"{name}: {report['found']:.0%} of {report['tried']} found; the others: build/mutants/{name}.json")


if __name__ == "__main__":
    main()
