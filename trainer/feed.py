"""Where the learner gets its batches: the one place that a batch passes on its way from the pipeline."""

from collections.abc import Callable

from services.wire.batch import TrainingBatch, decode_batch


class BatchFeed:
    """Batch after batch, from documents.

    Args:
        read: waits for the next document, which the pipeline beside this process makes. Another rank would read the same
            bytes, and a recorded run its files.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    def next(self) -> TrainingBatch:
        """The batch of the next step.

        Raises:
            PeerError: a server failed, or the document is no batch.
        """
        return decode_batch(self._read())
