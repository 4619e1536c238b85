"""Two engines, one file: what llama.cpp and MLX make of the same real weights."""

import gc
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from lmx.chat.model import ChatModel
from lmx.hub.inventory import EMBEDDED_ID, resolve
from lmx.protocol import Sampling
from tests.backends import needs_llama
from tests.engine_client import Answer, engine

pytestmark = needs_llama

QUESTIONS = (
    "What is the capital of Japan?", "How many days are in a week?", "What color is the sky?", "Name three colors.",
    "What is the opposite of hot?", "Who are you?", "Write one sentence about the sea.", "Say hello in French.",
)  # fmt: skip
TOKENS = 12
TOLERANCE = 0.05
"""Between log-probabilities above LIKELY: llama.cpp multiplies F16 by F16, with F16 KV; 0.028 was seen."""
LIKELY = -8.0


@dataclass(frozen=True)
class Side:
    chat: ChatModel
    answers: list[Answer]

    def texts(self) -> list[str]:
        return [self.chat.decode(answer.tokens) for answer in self.answers]


def ask(path: Path, cache: Path, backend: str) -> Side:
    """All questions at once, in steps of all eight, greedy."""
    found = resolve(str(path), cache, "llama" if backend == "llama" else "mlx")
    model = ChatModel.load(found.words)
    with engine(found.path, backend=backend) as client:
        sampling = Sampling(0, temperature=0.0, logprobs=20)
        prompts = [model.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        seqs = [client.submit(prompt, TOKENS, sampling) for prompt in prompts]
        client.wait_freed(*seqs)
        return Side(model, [client.answers[seq] for seq in seqs])


def write_f16(source: Path, target: Path) -> None:
    """The same file with its matrices in F16."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del reader
    gc.collect()  # its map of the file


def test_an_f16_file_says_the_same_on_both_engines(tmp_path: Path) -> None:
    path = tmp_path / "smollm2-f16.gguf"
    write_f16(resolve(EMBEDDED_ID, tmp_path, "llama").path, path)
    llama, mlx = (ask(path, tmp_path, backend) for backend in ("llama", "mlx"))
    assert llama.texts() == mlx.texts()
    for ours, theirs in zip(llama.answers, mlx.answers, strict=True):
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            likely = {token: p for token, p in zip(b.top_ids, b.top, strict=True) if p > LIKELY}
            found = dict(zip(a.top_ids, a.top, strict=True))
            far = {
                token: (found.get(token), p) for token, p in likely.items() if abs(found.get(token, p) - p) > TOLERANCE
            }
            assert far == {}
            assert a.top_ids[0] == b.top_ids[0]
    path.unlink()
