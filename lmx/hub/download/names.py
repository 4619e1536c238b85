"""What a person may write to have a model downloaded, taken apart: repository, revision, quantisation.

"org/name", "org/name@revision", "org/name:QUANT" (as Ollama and llama-server have them), "name", "name:tag", a
repository's address, with "hf.co/" before it or "hf://". Pure: no network, no disk, so that a name that cannot be one
is refused before a job is made of it. Called by ``lmx.serving.jobs`` and ``lmx.hub.download.choose``.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lmx.errors import InvalidRequest

DEFAULT_ENDPOINT = "https://huggingface.co"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"(?:({_PART})/)?({_PART})", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]{0,254}", re.ASCII)
_TAG = re.compile(r"[\w.-]{1,96}", re.ASCII)
_GGUF = re.compile(
    r"(?:UD-)?(?:I?Q\d(?:_\w+)?|TQ\d_\d|BF16|FP?16|FP?32|MXFP4(?:_\w+)?|NVFP4)", re.ASCII | re.IGNORECASE
)
_GGUF_QUANTIZATION = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:I?Q\d(?:_[0-9A-Z]+)*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4(?:_[A-Z]+)?|NVFP4))(?=$|[-_./])",
    re.ASCII | re.IGNORECASE,
)
_BITS = re.compile(r"(\d{1,2})-?bits?", re.ASCII | re.IGNORECASE)
_OTHER_MLX = re.compile(r"bf16|fp16|f16|mxfp[48]|nvfp4", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Name:
    """``publisher`` is "" for a bare name, which must be looked for."""

    publisher: str
    name: str
    revision: str
    """A branch, tag or commit; "": the main branch."""
    quantization: str
    """"Q4_K_M", "4bit", ...; "": whichever is preferred."""

    @property
    def repository(self) -> str:
        return f"{self.publisher}/{self.name}" if self.publisher else self.name


def read_name(written: str, *, revision: str = "", quantization: str = "") -> Name:
    """Take ``written`` apart; ``revision`` and ``quantization``, where given, win over what stands in it.

    Raises InvalidRequest.
    """
    text = written.strip()
    if not text or len(text) > 500 or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise _refusal(written, "it is empty, too long, or has control characters")
    text, found_revision, file = _without_address(text, written)
    text, _, after = text.partition("@")
    if after:
        after, _, tag = after.partition(":")
        found_revision = after
        text += f":{tag}" if tag else ""
    text, _, tag = text.partition(":")
    match = _NAME.fullmatch(text.rstrip("/"))
    if match is None or ".." in text or "--" in text:
        raise _refusal(written, f"{text[:100]!r} is no repository of the Hub")
    publisher, name = match[1] or "", match[2]
    revision = revision or found_revision
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _refusal(written, f"{revision[:100]!r} is no branch, tag or commit", "revision")
    if tag == "latest":  # Ollama's word for whichever is preferred
        tag = ""
    for word in (tag, quantization):
        if word and not _TAG.fullmatch(word):
            raise _refusal(written, f"{word[:100]!r} is no quantisation", "quantization")
    if tag and not is_quantization(tag):
        if publisher:
            raise _refusal(written, f"{tag!r} is no quantisation such as Q4_K_M, Q8_0 or 4bit", "quantization")
        name, tag = f"{name}-{tag}", ""  # Ollama's sizes: "qwen3:0.6b"
    return Name(publisher, name, revision, quantization or tag or gguf_quantization(file))


def is_quantization(word: str) -> bool:
    return bool(_GGUF.fullmatch(word) or _BITS.fullmatch(word) or _OTHER_MLX.fullmatch(word))


def gguf_quantization(path: str) -> str:
    """Of a file's name, or of the folder that holds the parts of a split one; the last such word counts."""
    found = _GGUF_QUANTIZATION.findall(path.removesuffix(".gguf"))
    return found[-1].upper() if found else ""


def mlx_suffix(quantization: str) -> str:
    """As mlx-community ends its names: "4bit" of "4-bit"; "" if it is none of MLX's."""
    if match := _BITS.fullmatch(quantization):
        return f"{int(match[1])}bit"
    return quantization.lower() if _OTHER_MLX.fullmatch(quantization) else ""


def endpoint() -> str:
    """The Hub that huggingface_hub will ask, without importing it."""
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def _without_address(text: str, written: str) -> tuple[str, str, str]:
    """Path, revision and file of an address; what is none comes back as it is."""
    if text.startswith("hf://"):
        return text.removeprefix("hf://").removeprefix("models/"), "", ""
    own = urlsplit(endpoint()).netloc
    if "://" not in text:
        host, slash, rest = text.partition("/")
        if not slash or host.lower() not in (*_HOSTS, own):
            return text, "", ""
        text = f"https://{host}/{rest}"
    address = urlsplit(text)
    if address.scheme not in ("http", "https") or address.netloc.lower() not in (*_HOSTS, own):
        raise _refusal(written, f"lmx downloads from the Hub alone ({endpoint()}; HF_ENDPOINT names another)")
    parts = [unquote(part) for part in address.path.split("/") if part]
    if parts and parts[0] in ("datasets", "spaces", "collections", "papers"):
        raise _refusal(written, f"it is an address of {parts[0]}, not of a model")
    revision = file = ""
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
        # A branch's own slashes cannot be told from a folder; they are given as `revision`.
        revision, file, parts = parts[3], "/".join(parts[4:]), parts[:2]
    return "/".join(parts), revision, file


def _refusal(written: str, why: str, param: str = "model") -> InvalidRequest:
    return InvalidRequest(
        f"{written[:200]!r} names no model to download: {why}. Write org/name, org/name@revision, org/name:QUANT, a "
        "name such as Qwen3-4B-4bit, or a repository's address on the Hub.",
        param=param,
    )
