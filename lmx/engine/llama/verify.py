"""What a row draws in one step, one logits after the other: after its last token, and after each of its drafts that was
what was drawn before it. And whether a context can forget what was not. Called by ``lmx.engine.llama.backend``."""

import sys
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from lmx.engine.backend import Draw, Sequence
from lmx.engine.grammar import Masks
from lmx.engine.llama.native import Context
from lmx.engine.sampling import Drawn, SamplingBatch, draw_key
from lmx.protocol import Logprobs

MAX_DEPTH = 15
# Logits of one pass are held for every token of every row that is verified, as far as they take so many bytes.
_LOGITS_BYTES = 64 * 1024**2
# What the proof computes, and by how much of the largest logit its results may differ: kernels for several tokens round
# otherwise than those for one, in half precision on GPUs.
_PROOF_TOKENS = (3, 4, 5, 6, 7)
_WRONG_TOKEN = 8
_TOLERANCE = 0.05

Logits = npt.NDArray[np.float32]


class RowDraws:
    """The draws of one row in a step."""

    def __init__(
        self,
        sequence: Sequence,
        sampling: Callable[[], SamplingBatch],
        counts: Seq[npt.NDArray[np.int32]],
        position: int,
        drafts: Seq[int],
        masks: Masks | None,
    ) -> None:
        """``counts`` follow what is drawn. ``position``: that of the first draw. ``masks``: one for each draw there may
        be; None: there are none."""
        self._sequence = sequence
        self._sampling = sampling
        self._counts = counts
        self._position = position
        self._drafts = drafts
        self._masks = masks
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._bad = False
        self._done = False
        self.tainted = False
        """A draft that does not count left something that is not finite."""

    def take(self, logits: Logits) -> None:
        """Those of its next position."""
        if self._done:
            self.tainted |= not np.isfinite(logits.max())
            return
        place = len(self._tokens)
        try:
            key = draw_key(self._sequence.sampling.seed, self._position + place)
            masks = None if self._masks is None else self._masks[place : place + 1]
            drawn = self._sampling().draw(logits[None], [key], self._counts, masks)
            self._bad = bool(drawn.bad[0])
            if not self._bad:
                self._add(int(drawn.tokens[0]), drawn)
        except Exception:
            # Arithmetic on one request's own values: nobody else's business, whatever is wrong with them.
            name = self._sequence.request_id
            print(f"request {name}: its draw failed: {traceback.format_exc()}", file=sys.stderr)
            self._bad = True
        self._done = self._bad or place == len(self._drafts) or self._tokens[-1] != self._drafts[place]

    def _add(self, token: int, drawn: Drawn) -> None:
        self._tokens.append(token)
        for counts in self._counts:
            counts[0, token] += 1
        if drawn.logprobs is not None:
            assert drawn.top_ids is not None
            assert drawn.top_logprobs is not None
            wanted = self._sequence.sampling.logprobs
            ids, values = drawn.top_ids[0, :wanted], drawn.top_logprobs[0, :wanted]
            self._logprobs.append(Logprobs(float(drawn.logprobs[0]), tuple(ids.tolist()), tuple(values.tolist())))

    def result(self) -> Draw:
        if self._bad:
            for token in self._tokens:
                for counts in self._counts:
                    counts[0, token] -= 1
            return Draw(self._sequence, (0,), True)
        return Draw(self._sequence, tuple(self._tokens), False, tuple(self._logprobs))


class Unread:
    """A row that draws nothing: but what is not finite must be seen in the step that writes it."""

    tainted = False

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._bad = False

    def take(self, logits: Logits) -> None:
        self._bad = not np.isfinite(logits.max())

    def result(self) -> Draw:
        return Draw(self._sequence, (0,), self._bad)


def allowed(drafts: Seq[int], masks: Masks) -> int:
    """How many of the drafts may be drawn; one that may not would be computed in vain, and all after it."""
    for place, draft in enumerate(drafts):
        if not masks[place, draft >> 5] >> np.uint32(draft & 31) & np.uint32(1):
            return place
    return len(drafts)


def outputs(rows: int, depth: int, vocab_size: int) -> int:
    """Tokens whose logits one pass gives, where rows verify so many drafts each."""
    return min(rows * (1 + depth), _LOGITS_BYTES // (4 * vocab_size))


def refusal(context: Context) -> str:
    """Why the context cannot verify drafts; "": it can. Tried in its first slot, which is empty before and after."""
    try:
        single = [_logits(context, place, [token])[0] for place, token in enumerate(_PROOF_TOKENS)]
        if not context.forget(0, 2):
            return "the memory does not go back to an earlier token"
        together = [*_logits(context, 2, [_PROOF_TOKENS[2], _WRONG_TOKEN, _WRONG_TOKEN])[:1]]
        if not context.forget(0, 3):
            return "the memory does not forget a draft that was wrong"
        together.extend(_logits(context, 3, _PROOF_TOKENS[3:]))
    finally:
        context.forget(0)
    off = np.abs(np.array(single[2:]) - np.array(together)).max()
    most = _TOLERANCE * np.abs(single).max()
    return "" if off <= most else f"logits of several tokens differ by {off:.3g} from those of single ones"


def _logits(context: Context, start: int, tokens: Seq[int]) -> Logits:
    count = len(tokens)
    return context.decode(tokens, range(start, start + count), [0] * count, [True] * count).copy()
