"""Two teachers as real processes, each asked about the rows that name it."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from services.clients import RolloutClient, TeacherClient
from services.config import RunConfig
from tests.integration.processes import KEY, server
from tests.models import save_model
from tests.servers import EOS, Servers, rollout_info
from tests.unit.trainer.attached import scored
from tests.unit.trainer.teachers_choices import ROLLOUTS
from trainer.attach import preflight
from trainer.groups import Rollout
from trainer.tiny.pair import build_tokenizer

pytestmark = pytest.mark.integration


async def test_each_of_two_teachers_scores_the_rollouts_of_its_own_rows(models: dict[str, str], tmp_path: Path) -> None:
    """Through the preflight, against what either says when it is asked alone; their weights differ."""
    rollouts = [
        Rollout(replace(r.prompt, teacher="maths" if i % 3 else None), r.completion, 0) for i, r in enumerate(ROLLOUTS)
    ]
    config, tokenizer = RunConfig(), build_tokenizer()
    other_model = save_model(tmp_path / "m", "llama", seed=7)
    with (
        server("teacher", tmp_path / "log", "--teacher.model", models["llama"]) as teacher,
        server("teacher", tmp_path / "maths.log", "--teacher.model", other_model) as other,
    ):
        async with TeacherClient([teacher.url], key=KEY) as own, TeacherClient([other.url], key=KEY) as maths:
            clients, students = {None: own, "maths": maths}, Servers(rollout_info())
            infos, teachers = await preflight.attach(config, cast(RolloutClient, students), clients)
            await preflight.check_teachers(config, tokenizer, EOS, teachers)
            support = preflight.choose_support(config.loss, len(tokenizer), infos, teachers)
            samples, quarantined = await scored(teachers, rollouts, support=support, temperature=0.7)
            sequences = [(r.sequence, len(r.prompt.token_ids)) for r in rollouts]
            alone = {n: await c.score(sequences, top_k=support.size, temperature=0.7) for n, c in clients.items()}
    assert [s.rollout for s in samples] == rollouts and quarantined == []
    assert np.abs(alone[None].token_logprobs - alone["maths"].token_logprobs).max() > 0.1
    for index, sample in enumerate(samples):
        scores = alone[sample.rollout.prompt.teacher]
        rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
        np.testing.assert_allclose(sample.teacher_token_logprobs, scores.token_logprobs[rows], atol=1e-5)
        np.testing.assert_allclose(sample.teacher_support_logprobs, scores.topk_logprobs[rows], atol=1e-5)
        np.testing.assert_allclose(sample.teacher_tail_logprob, scores.tail_logprobs[rows], atol=1e-5)
