"""Where drafts come from: guesses of a sequence's next tokens, which the model verifies (DESIGN §6).

``Drafts`` is what the step loop's ``lmx.engine.speculation`` knows of it. A source only ever guesses: what it says
changes how fast an answer comes and never which one.
"""

from lmx.engine.drafts.drafts import Drafts
from lmx.engine.drafts.source import Source

__all__ = ["Drafts", "Source"]
