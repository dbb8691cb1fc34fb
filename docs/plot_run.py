"""Draw a run's held-out exact match and reverse KL over steps: python docs/plot_run.py outputs/tiny docs/tiny-run.png

Needs a run with evaluations in between: make train ARGS="--evaluation.every_steps 20"
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(run: Path, picture: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "single_step_kl" in row]
    evaluations = [row for row in rows if "eval_reverse_kl" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.semilogy([r["step"] for r in steps], [r["single_step_kl"] for r in steps], color="tab:gray", lw=0.8)
    left.semilogy([r["step"] for r in evaluations], [r["eval_reverse_kl"] for r in evaluations], "o-", color="tab:blue")
    left.set(title="reverse KL per token, nats", xlabel="step")
    left.legend(["training batch, estimate", "held-out"], frameon=False)
    right.plot([r["step"] for r in evaluations], [r["eval_exact_match"] for r in evaluations], "o-", color="tab:green")
    right.set(title="held-out exact match", xlabel="step", ylim=(0, 1.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
