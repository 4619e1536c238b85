"""Whether one model can draft for another: its token ids must mean the same. Reads files, never weights; blocking."""

from pathlib import Path

from tokenizers import Tokenizer

from lmx.errors import ModelInvalid
from lmx.hub.inventory import ModelFolder


def check_draft(target: ModelFolder, draft: ModelFolder) -> None:
    """Raises ModelInvalid where ``draft`` runs on another engine, or has other tokens than ``target``."""
    if draft.backend != target.backend:
        raise ModelInvalid(
            f"draft_model {draft.id!r} runs on another engine than {target.id!r} ({draft.backend_reason}): choose one "
            "of the same format.",
            param="draft_model",
        )
    ours, theirs = _vocabulary(target.words), _vocabulary(draft.words)
    if ours != theirs:
        odd = min((set(ours.items()) ^ set(theirs.items())), key=lambda token: (token[1], token[0]))
        raise ModelInvalid(
            f"draft_model {draft.id!r} has another vocabulary than {target.id!r}: token {odd[1]} is "
            f"{odd[0][:40]!r} in one of them only. Choose a smaller model of the same family.",
            param="draft_model",
        )


def _vocabulary(words: Path) -> dict[str, int]:
    path = words / "tokenizer.json"
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelInvalid(f"{path} cannot be read: {error}", param="draft_model") from None
    return vocabulary
