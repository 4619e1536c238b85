"""What a step's draws need of its rows, and what is read of them: for the launches of the MLX back end, with drafts
(``verify``) and without (``backend``). Decides nothing."""

import operator
from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from lmx.engine.backend import Sequence
from lmx.engine.mlx.arena import Lane
from lmx.engine.sampling import Drawn, SamplingBatch
from lmx.protocol import Logprobs, Sampling

_DUMMY = Sampling(seed=0, temperature=0.0)


class Batches:
    """Each lane's last ``SamplingBatch``: good as long as the same sequences draw in the same places."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kept: WeakKeyDictionary[Lane, tuple[list[Sequence | None], SamplingBatch]] = WeakKeyDictionary()

    def get(self, lane: Lane, rows: list[Sequence | None]) -> SamplingBatch:
        """``rows``: whose each draw is; None: nobody's."""
        then, batch = self._kept.get(lane, ([], None))
        if batch is None or len(then) != len(rows) or any(map(operator.is_not, then, rows)):
            sampling = [sequence.sampling if sequence else _DUMMY for sequence in rows]
            batch = SamplingBatch(mx, sampling, self._vocab_size)
            self._kept[lane] = (rows, batch)
        return batch


class Read:
    """The results of a draw that is done."""

    def __init__(self, drawn: Drawn) -> None:
        self.tokens: list[int] = np.array(drawn.tokens).tolist()
        self.bad: list[bool] = np.array(drawn.bad).tolist()
        self._logprobs = None
        if drawn.logprobs is not None:
            assert drawn.top_ids is not None
            assert drawn.top_logprobs is not None
            self._logprobs = [np.array(a).tolist() for a in (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)]

    def logprobs(self, indices: Seq[int], sequence: Sequence) -> tuple[Logprobs, ...]:
        """Of those draws, which are the sequence's; () where it wants none."""
        wanted = sequence.sampling.logprobs
        if self._logprobs is None or wanted < 0:
            return ()
        values, ids, of_ids = self._logprobs
        return tuple(Logprobs(values[i], tuple(ids[i][:wanted]), tuple(of_ids[i][:wanted])) for i in indices)


def arrays(drawn: Drawn) -> list[mx.array]:
    """Those that there are."""
    found = (drawn.tokens, drawn.bad, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
    return [array for array in found if array is not None]
