"""How the parts of a split GGUF file are called: ``NAME-00001-of-00003.gguf``, as llama.cpp writes and finds them.

Names only, nothing is opened. Called by the inventory, by the key of a conversion, and by the converter.
"""

import os
import re
from pathlib import Path

_QUANTIZATION = re.compile(
    r"(?<![^-_./])(?:UD-)?(?:I?Q\d(?:_[0-9A-Z]+)*|TQ\d_\d|BF16|F16|FP16|F32|FP32|MXFP4(?:_[A-Z]+)?|NVFP4)(?![^-_./])",
    re.ASCII | re.IGNORECASE,
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)


def part_paths(path: Path) -> list[Path]:
    """All parts that ``path``, one of them, belongs to, the first one first, present or not; else ``[path]``."""
    found = _PART.fullmatch(path.stem)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return [path]
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}{path.suffix}") for number in range(1, count + 1)]


def model_name(path: Path) -> str:
    """The file's name without ".gguf" and the number of a part."""
    found = _PART.fullmatch(path.stem)
    return found["stem"] if found else path.stem


def printable(name: str, most_bytes: int = 255) -> str:
    """A file's name as text that every log and JSON can hold, cut to so many bytes of UTF-8."""
    return os.fsencode(name).decode(errors="replace").encode()[:most_bytes].decode(errors="ignore")


def quantization_of(name: str) -> str:
    """The quantisation that a file's name ends with, in capitals: "Q4_K_M", "UD-Q4_K_XL"; "" if it names none."""
    found = _QUANTIZATION.findall(name)
    return str(found[-1]).upper() if found else ""
