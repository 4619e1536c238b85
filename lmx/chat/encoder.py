"""An embedding model's words: its tokenizer, and the prompts that its makers want before a text.

As ``ChatModel`` for models that read and do not write: no template, no ends, no way back from tokens to text. Called
from worker threads and by ``lmx.api.reader``; nothing in it changes after it was made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lmx.chat.files import named_tokens, read_settings
from lmx.errors import InvalidRequest, ModelInvalid
from lmx.hub.sentence import Sentence, read_sentence


class TextEncoder:
    sentence: Sentence
    vocab_size: int
    """One more than the largest token id; the engine's matrix may have more rows, as padding."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelInvalid(f"{path} cannot be used: {error}. Is it whole? Download it again.") from None
        # Training leaves both switched on in many files; MiniLM's cuts at 128.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.sentence = read_sentence(folder)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._before, self._after = self._missing(folder)

    @classmethod
    def load(cls, folder: Path) -> "TextEncoder":
        """Blocks. Raises ModelInvalid."""
        return cls(folder)

    def _missing(self, folder: Path) -> tuple[list[int], list[int]]:
        """What some files leave to the Python class that they name: BOS and EOS around each text."""
        settings = read_settings(folder)
        names, added = named_tokens(settings), self._tokenizer.encode("").ids
        found: list[list[int]] = []
        for kind in ("bos", "eos"):
            token = self._tokenizer.token_to_id(names.get(f"{kind}_token", ""))
            if token is None or token in added or settings.get(f"add_{kind}_token") is not True:
                found.append([])
            else:
                found.append([token])
        return found[0], found[1]

    def encode(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """The tokens of each text behind ``prompt``, with the special tokens of the model. Raises InvalidRequest."""
        whole = [prompt + text for text in texts]
        if self.sentence.lowercase:
            whole = [text.lower() for text in whole]
        return [self._before + ids + self._after for ids in self._encode(whole)]

    def encode_pairs(self, first: str, seconds: Sequence[str]) -> list[tuple[list[int], int]]:
        """For a cross-encoder: the tokens of each pair, and where its second text begins. Raises InvalidRequest."""
        pairs = []
        for encoding in self._encodings([(first, second) for second in seconds]):
            ids: list[int] = encoding.ids
            pairs.append((ids, encoding.type_ids.index(1) if 1 in encoding.type_ids else len(ids)))
        return pairs

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str | tuple[str, str]]) -> list[Any]:
        try:
            # Not encode(), which holds the GIL.
            return list(self._tokenizer.encode_batch_fast(texts))
        except TypeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise InvalidRequest(
                "input holds text that is not Unicode: a lone surrogate (\\ud800 to \\udfff).", param="input"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # pyo3's PanicException is no Exception
            raise InvalidRequest(
                f"The model's tokenizer cannot read the input ({type(error).__name__}: {str(error)[:200]}).",
                param="input",
            ) from None
