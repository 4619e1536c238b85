"""Makes tokenizer.json and tokenizer_config.json from the vocabulary inside a GGUF file.

Part of the converter process. Two families: byte-level BPE (GGUF's model "gpt2"), whose pre-tokenizer the file only
names, and SentencePiece BPE (model "llama"), whose merges follow from the scores.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmx.errors import ModelInvalid
from lmx.hub.gguf_file import GgufFile

_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# GGUF's token types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's name of a pre-tokenizer → the regexes that cut the text, one after the other, before the byte level.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "codeshell": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
# These look a whole word up before they merge, and begin with BOS where the file does not say otherwise.
_LLAMA3_LIKE = {"llama-bpe", "llama3", "llama-v3", "tekken"}
# Ends of a turn that files often fail to name; the list llama.cpp treats as ends of generation.
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "< EOT >",
    "_<EOT>",
)


def write_tokenizer(file: GgufFile, folder: Path) -> list[int]:
    """Write both files; the ids that end a generation, the file's EOS first. Raises ModelInvalid."""
    tokens: list[str] = file.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise ModelInvalid(f"{file.path} has no vocabulary (tokenizer.ggml.tokens); lmx cannot use it.")
    types: list[int] = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    model = file.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
        add_bos = file.get("tokenizer.ggml.pre") in _LLAMA3_LIKE
    elif model == "llama":
        tokenizer = _sentence_piece(file, tokens, types)
        add_bos = True
    else:
        raise ModelInvalid(
            f"{file.path} has a tokenizer of the kind {model!r}; lmx reads 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE). Take the model as an MLX folder."
        )
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])

    ids = {key: file.get(f"tokenizer.ggml.{field}_token_id") for key, field in _NAMED_TOKENS.items()}
    named = {key: tokens[index] for key, index in ids.items() if index is not None and index < len(tokens)}
    if file.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, ids["bos_token"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config.update(named)
    config["model_max_length"] = int(file.need("context_length"))
    template = file.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return _end_ids(file, tokens, types)


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PATTERNS:
        raise ModelInvalid(
            f"{file.path} names the pre-tokenizer {pre!r}; lmx knows {', '.join(sorted(_PATTERNS))}. "
            "Take the model as an MLX folder, which carries its own tokenizer.json."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges") or []]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3_LIKE))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE joins the neighbours whose union scores highest: each cut of a token in two is a merge."""
    scores: list[float] = file.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ModelInvalid(f"{file.path} has {len(scores)} token scores for {len(tokens)} tokens; it is damaged.")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, token in enumerate(tokens):
        if types[index] == 1:
            for cut in range(1, len(token)):
                left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[index], left, right, token[:cut], token[cut:]))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _end_ids(file: GgufFile, tokens: list[str], types: list[int]) -> list[int]:
    fields = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    named = [int(token) for token in fields if token is not None]
    control = {token: index for index, token in enumerate(tokens) if types[index] in (_CONTROL, _USER_DEFINED)}
    ids = list(dict.fromkeys([*named, *(control[token] for token in _END_TOKENS if token in control)]))
    if not ids:
        raise ModelInvalid(f"{file.path} names no end-of-text token, so no answer would ever end.")
    return ids
