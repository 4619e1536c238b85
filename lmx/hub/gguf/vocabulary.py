"""Reads the vocabulary of a GGUF file: tokens, what kind each is, and which of them end a generation.

``lmx.hub.gguf.tokenizer`` calls it. Files leave much unsaid or say it wrongly; the lists of names below are how
llama.cpp (src/llama-vocab.cpp as of llama-cpp-python 0.3.36) finds out, so that both engines end at the same tokens.
One thing is not copied: llama.cpp takes the marks of gpt-oss's messages out of user text too, as turns of their own.
"""

from dataclasses import dataclass

from lmx.errors import ModelInvalid
from lmx.hub.gguf.file import GgufFile

# GGUF's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

_KINDS = ("gpt2", "llama", "gemma4", "bert")
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}
_WORD_PIECE_IDS = {"bos": 101, "eos": 102, "unk": 100, "pad": 0}
"""[CLS] and [SEP] stand where others have BOS and EOS."""
_END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"),
    *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>", "<|tool_response>", "[e~["),
)
# Tokens for filling in the middle of a text; after these a generation has ended, too. One of each.
_FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_FILL_IN_TOKENS = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    kind: str
    """tokenizer.ggml.model: "gpt2", "llama", "gemma4" or "bert"."""
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    named: dict[str, int]
    """The ids of "bos", "eos", "unk" and "pad", as far as there are such tokens."""
    ends: tuple[int, ...]
    """The file's EOS first; none for "bert", whose models do not write."""


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Raises ModelInvalid for a vocabulary of another kind, a damaged one, and one without an end of a generation."""
    words: list[str] = file.get("tokenizer.ggml.tokens") or []
    if not words:
        raise ModelInvalid(f"{file.path} has no vocabulary (tokenizer.ggml.tokens); lmx cannot use it.")
    kind = file.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ModelInvalid(
            f"{file.path} has a tokenizer of the kind {kind!r}; lmx reads 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece BPE), 'gemma4' and 'bert'. Take the model as an MLX folder."
        )
    tokens = [word or f"[EMPTY_{index}]" for index, word in enumerate(words)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelInvalid(f"{file.path} has {len(tokens)} tokens, of which only {len(ids)} differ; it is damaged.")
    types: list[int] = list(file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelInvalid(f"{file.path} has {len(types)} token types for {len(tokens)} tokens; it is damaged.")
    defaults = {"llama": _SENTENCE_PIECE_IDS, "bert": _WORD_PIECE_IDS}.get(kind, {})
    named = {
        name: int(index)
        for name, field in _NAMED_TOKENS.items()
        if (index := file.get(f"tokenizer.ggml.{field}_token_id", defaults.get(name))) is not None
        and index < len(tokens)
    }
    if kind == "bert":
        for name, field in (("bos", "cls"), ("eos", "seperator")):  # GGUF's spelling
            named[name] = int(file.get(f"tokenizer.ggml.{field}_token_id", named[name]))
        return Vocabulary(kind, tokens, types, ids, named, ())
    by_field = {name: file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom", *_FILL_IN_ENDS)}
    by_name = [ids[token] for token in _END_TOKENS if token in ids]
    for name, candidates in _FILL_IN_ENDS.items():
        if by_field[name] is None:
            by_name += [ids[token] for token in candidates if token in ids][:1]
    for index in (*by_name, *(ids[token] for token in _FILL_IN_TOKENS if token in ids)):
        types[index] = CONTROL
    ends = [int(index) for index in (named.get("eos"), *by_field.values()) if index is not None and index < len(tokens)]
    ends = _without_false_ends(list(dict.fromkeys([*ends, *by_name])), tokens, types)
    if not ends:
        raise ModelInvalid(f"{file.path} names no end-of-text token, so no answer would ever end.")
    return Vocabulary(kind, tokens, types, ids, named, tuple(ends))


def _without_false_ends(ends: list[int], tokens: list[str], types: list[int]) -> list[int]:
    """Two names of an end that mean something else in some vocabularies."""
    names = {tokens[index] for index in ends}
    false = set()
    if names >= {"<|return|>", "<|call|>"} or ("<|flush|>" in names and names & {"<|call|>", "<|calls|>"}):
        false.add("<|end|>")  # gpt-oss and Solar end a message with it, of which an answer has several
    if "<|tool_response>" in names:
        false.add("</s>")  # in Gemma 4 an HTML tag like any other
        for index in ends:
            if tokens[index] == "</s>":
                types[index] = NORMAL
    return [index for index in ends if tokens[index] not in false]
