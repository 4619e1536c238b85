r"""The pre-tokenizers that GGUF files name: how each cuts a text before byte-level BPE joins bytes.

A table, read by ``lmx.hub.gguf.tokenizer``. The cuts are llama.cpp's (src/llama-vocab.cpp as of llama-cpp-python
0.3.36), which for a few families differ from the model's own tokenizer.json; tests/test_gguf_tokens.py compares every
name with it. One thing is not copied: characters that Unicode added after version 15, which llama.cpp's tables lack,
are what Unicode says here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    patterns: tuple[str, ...]
    """Applied one after the other, each to what the one before left; what no pattern matches is a piece as well."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Where the file does not say."""


# Spelled out, because (?i:'s) would match "'ſ" too.
_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PHRASE = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _any_of(*patterns: str) -> str:
    return "|".join(patterns)


def _cased_words(suffix: str = "") -> str:
    """Words cut where upper case follows lower case; letters without ASCII's cases count as both."""
    start, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
    return _any_of(f"{start}{upper}*{lower}+{suffix}", f"{start}{upper}+{lower}*{suffix}")


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _any_of(_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _SPACE)
_QWEN2 = _any_of(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _SPACE)
_QWEN35 = _any_of(
    _CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    _SPACE,
)
_SLASHED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _any_of(_cased_words(), r"\p{N}", _SLASHED_SYMBOLS, _SPACE)
_GPT4O = _any_of(_cased_words(f"(?:{_CONTRACTION})?"), r"\p{N}{1,3}", _SLASHED_SYMBOLS, _SPACE)
_TINY_AYA = _any_of(
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_CONTRACTION})?", r"\p{N}{1,3}", _SLASHED_SYMBOLS, _SPACE
)
# llama.cpp cuts behind each group only, so the first one keeps the text before it.
_THREES_FROM_THE_RIGHT = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\P{N}+"
_DEEPSEEK3_WORDS = _any_of(
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    _SPACE,
)
_EAST_ASIAN = r"[\u0800-龥가-\ud7ff&&\S]+"
# Letters with case, without the blocks that DeepSeek's list leaves out.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2f\ua790-\ua7ff\uab30-\uab6f"
    r"\x{10570}-\x{105bf}\x{10d50}-\x{10d8f}\x{16e40}-\x{16e7f}\x{1d400}-\x{1dfff}]]"
)
_DEEPSEEK_SYMBOLS = r"\s?[!-/:-~！-／：-～‘-‟\u3001-\u3002]+"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}\x{2f800}-\x{2fa1f}"
_KIMI_K2 = _any_of(
    rf"[{_HAN}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_CONTRACTION})?",
    r"\p{N}{1,3}",
    _SYMBOLS,
    _SPACE,
)
_AFMOE_SCRIPTS = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff\u1780-\u17ff"
    r"\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\u1100-\u11ff]+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_ROWS: tuple[tuple[PreTokenizer, str], ...] = (
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), "falcon"),
    (
        PreTokenizer((_GPT2,)),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum",
    ),
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (PreTokenizer((_LLAMA3,), ignore_merges=True), "glm4 glm5"),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    (
        PreTokenizer((_QWEN2,)),
        "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe bailingmoe2 llada-moe",
    ),
    (PreTokenizer((_QWEN35,)), "qwen35"),
    (PreTokenizer((_any_of(_WORD, r"\p{N}", _SYMBOLS, _SPACE),)), "ufakzeka"),
    (PreTokenizer((r"[^\n]+|\n+", _QWEN2)), "laguna"),
    (
        PreTokenizer((r"\p{N}{1,3}", _any_of(_CONTRACTION, _WORD, r"\p{N}+", _SYMBOLS, _SPACE)), ignore_merges=True),
        "minicpm5",
    ),
    (
        PreTokenizer((_any_of(_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACE),)),
        "seed-coder",
    ),
    (
        PreTokenizer((_any_of(_CONTRACTION, _PHRASE, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]?", _SPACE),)),
        "exaone-moe",
    ),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizer((_THREES_FROM_THE_RIGHT, _TINY_AYA)), "tiny_aya cohere2moe"),
    (PreTokenizer((_THREES_FROM_THE_RIGHT, _AFMOE_SCRIPTS, _DEEPSEEK3_WORDS)), "afmoe"),
    (
        PreTokenizer((r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3_WORDS)),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    ),
    (
        PreTokenizer((r"[\r\n]", rf"\s?{_DEEPSEEK_LETTERS}+", _DEEPSEEK_SYMBOLS, r"\s+\z", _EAST_ASIAN, r"\p{N}+")),
        "deepseek-llm",
    ),
    (PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")), "deepseek-coder"),
    (PreTokenizer((_KIMI_K2,)), "kimi-k2"),
    (PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((_BLOOM, r"\p{N}")), "viking"),
)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for row, names in _ROWS for name in names.split()}
"""By ``tokenizer.ggml.pre``."""
