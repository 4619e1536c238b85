"""Makes tokenizer.json and tokenizer_config.json from the vocabulary inside a GGUF file.

Part of the converter process. Token ids are those that llama.cpp's own tokenizer gives (src/llama-vocab.cpp as of
llama-cpp-python 0.3.36). Four families: byte-level BPE (GGUF's model "gpt2"), whose pre-tokenizer the file only names;
SentencePiece BPE ("llama"), whose merges follow from the scores; Gemma 4's ("gemma4"), SentencePiece's alphabet
with merges of its own; and BERT's WordPiece ("bert").
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmx.errors import ModelInvalid
from lmx.hub.gguf.file import GgufFile
from lmx.hub.gguf.pretokenizers import PRE_TOKENIZERS
from lmx.hub.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary


def write_tokenizer(file: GgufFile, folder: Path) -> list[int]:
    """Write both files; the ids that end a generation, the file's EOS first. Raises ModelInvalid."""
    vocabulary = read_vocabulary(file)
    if vocabulary.kind == "gpt2":
        tokenizer, add_bos = _byte_level(file, vocabulary)
    elif vocabulary.kind == "bert":
        tokenizer, add_bos = _word_piece(vocabulary), True
    else:
        tokenizer = _sentence_piece(file, vocabulary) if vocabulary.kind == "llama" else _gemma4(file, vocabulary)
        add_bos = True
    _add_tokens(tokenizer, vocabulary, str(file.get("general.name", "")))
    if vocabulary.kind != "gemma4":  # which needs its BOS whatever the file says
        add_bos = file.get("tokenizer.ggml.add_bos_token", add_bos)
    _add_ends(
        tokenizer, vocabulary, bos=add_bos, eos=file.get("tokenizer.ggml.add_eos_token", vocabulary.kind == "bert")
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.named.items()}
    config["model_max_length"] = int(file.need("context_length"))
    template = _chat_template(file)
    if template:
        config["chat_template"] = template
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return list(vocabulary.ends)


def _chat_template(file: GgufFile) -> str | list[dict[str, str]] | None:
    """A list where the file has several, as tokenizer_config.json holds them."""
    default: str | None = file.get("tokenizer.chat_template")
    sources = {"default": default}
    sources |= {
        name: file.get(f"tokenizer.chat_template.{name}") for name in file.get("tokenizer.chat_templates") or ()
    }
    templates = [{"name": name, "template": source} for name, source in sources.items() if source]
    return default if len(sources) == 1 else templates


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, model_name: str) -> None:
    """The tokens that are cut out of a text before anything else."""
    # Nothing in the file says that these models' turns swallow the white space behind their marks.
    phi3 = "phi-3" in model_name.lower() or "phi3" in model_name.lower()
    added = [
        AddedToken(
            token,
            special=kind != USER_DEFINED,
            normalized=False,
            rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, *, bos: bool, eos: bool) -> None:
    names = [name for name, wanted in (("bos", bos), ("eos", eos)) if wanted and name in vocabulary.named]
    if not names:
        return
    special = {name: (vocabulary.tokens[vocabulary.named[name]], vocabulary.named[name]) for name in names}
    before = [f"{special['bos'][0]}:0"] if "bos" in special else []
    after = [f"{special['eos'][0]}:0"] if "eos" in special else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after], special_tokens=list(special.values())
    )


def _word_piece(vocabulary: Vocabulary) -> Tokenizer:
    """GGUF marks the beginnings of words (▁), BERT what is none (##)."""
    ids = {}
    for token, index in vocabulary.ids.items():
        special = vocabulary.types[index] in (CONTROL, UNKNOWN) or (token[0] == "[" and token[-1] == "]")
        ids[token if special else token[1:] if token[0] == "▁" else f"##{token}"] = index
    unknown = vocabulary.tokens[vocabulary.named["unk"]]
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """And whether texts begin with BOS where the file does not say."""
    name = file.get("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise ModelInvalid(
            f"{file.path} names the pre-tokenizer {name!r}; lmx knows {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Take the model as an MLX folder, which carries its own tokenizer.json."
        )
    pre = PRE_TOKENIZERS[name]
    merges = list(_merges(file, vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Characters that some vocabularies lack (Falcon's has no U+001D). They give no token, but what stands on both sides
    # must not merge over them. Bytes above 0x7F that can be missing are none of UTF-8's.
    missing = [byte for byte in range(128) if byte_level.pre_tokenize_str(chr(byte))[0][0] not in vocabulary.ids]
    if missing:
        characters = "".join(rf"\x{byte:02x}" for byte in missing)
        cuts.append(pre_tokenizers.Split(Regex(f"[{characters}]"), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _merges(file: GgufFile, vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    merges: list[str] = file.get("tokenizer.ggml.merges") or []
    if not merges:
        raise ModelInvalid(f"{file.path} has tokens but no merges (tokenizer.ggml.merges); lmx cannot use it.")
    for merge in merges:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise ModelInvalid(f"{file.path} merges {merge!r}, which are no tokens of its vocabulary; it is damaged.")
        yield left, right


def _sentence_piece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE joins the neighbours whose union scores highest: each cut of a token in two is a merge.

    llama.cpp takes the leftmost of equal scores, so that a run of blanks, whose tokens often score the same, grows from
    the left as far as there are tokens. Merges rank the same everywhere; for runs, longest first comes to the same.
    """
    tokens, ids = vocabulary.tokens, vocabulary.ids
    scores: list[float] = file.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ModelInvalid(f"{file.path} has {len(scores)} token scores for {len(tokens)} tokens; it is damaged.")
    ranked: list[tuple[float, int, int, int]] = []
    for index, token in enumerate(tokens):
        if vocabulary.types[index] in (CONTROL, UNKNOWN):
            continue  # never out of a text's characters
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], -len(token), left, right))
    ranked.sort()
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    return _blanks_as_letters(vocabulary, [(tokens[left], tokens[right]) for *_, left, right in ranked], prefix)


def _gemma4(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    """Lines are merged each for itself, and so are the breaks between them."""
    tokenizer = _blanks_as_letters(vocabulary, list(_merges(file, vocabulary)), prefix=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    return tokenizer


def _blanks_as_letters(vocabulary: Vocabulary, merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    """``prefix``: a text, and what follows a special token, begins with a blank that is no part of it."""
    unknown = vocabulary.tokens[vocabulary.named.get("unk", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
