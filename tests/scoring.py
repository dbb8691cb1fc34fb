"""What an engine of the teacher answers without a server: what a server's answers are compared with."""

from services.models.padding import cut_by_padded_tokens
from services.teacher.jobs import EncodedSequence, ScoreJob
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherScores


def score_alone(
    engine: TransformersEngine, sequences: list[EncodedSequence], *, top_k: int, temperature: float
) -> TeacherScores:
    """The scores of one request, by itself and without a queue."""
    job = ScoreJob(sequences, top_k=top_k, temperature=temperature)
    items = job.items()
    for group in cut_by_padded_tokens([len(s.token_ids) for s in sequences], engine.tokens_per_forward):
        engine.forward([items[index] for index in group])
    return job.scores(engine.info)
