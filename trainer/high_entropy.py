"""Which tokens of a step a policy gradient looks at, where it looks at those with the highest entropy alone."""

from collections.abc import Sequence

import numpy as np
import torch

from trainer.ranks.group import Ranks


def highest_share(entropies: Sequence[torch.Tensor], share: float, ranks: Ranks) -> float:
    """The entropy from which on a token is among the highest `share` of the step's, over all ranks; 0 leaves the highest alone
    (Beyond the 80/20 Rule, arXiv 2506.01939).

    Args:
        entropies: [N] of each micro-batch of this rank, of trained tokens; the ranks must all ask.
        share: 0 to 1.

    Returns:
        The quantile 1 - share, linear between two tokens; minus infinity where there is no token.
    """
    mine = torch.cat([torch.zeros(0), *(entropy.float().cpu() for entropy in entropies)])
    most = int(ranks.gather(torch.tensor(len(mine))).max())
    padded = torch.full((most,), torch.nan)
    padded[: len(mine)] = mine
    values = ranks.gather(padded).flatten()
    known = values[~values.isnan()].numpy()
    # As float32, in which the entropies are compared with it.
    return float(np.quantile(known, 1 - share)) if len(known) else -float("inf")
