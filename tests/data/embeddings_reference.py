"""How tests/data/embeddings.json was made; not a test, and run by nobody but a person who wants to make it again:

    python -m venv ref && ref/bin/pip install torch sentence-transformers==6.2.0 transformers==5.24.0
    ref/bin/python tests/data/embeddings_reference.py FOLDER_OF_ALL_MINILM_L6_V2

The vectors of MiniLM are sentence-transformers'. The others are those of tiny models of transformers' own classes;
their weights are a formula of a tensor's name and place (``weight``), so that the test can write the same ones without
torch.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    "A short one.",
    "The quick brown fox jumps over the lazy dog.",
    "Ein Satz mit Umlauten: Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語の文章も、いくつかの漢字を含んでいます。",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "The server hands a lease out for each request. " * 20,
]
IDS = [
    [5, 9, 17, 3, 44, 21, 8, 90, 61, 33, 12, 7, 70, 25, 18, 6, 11, 54, 29, 80],
    [5, 77, 31, 6],
    [5, 13, 40, 66, 2, 6],
]
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 96,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2, **COMMON},
    "roberta": {
        "model_type": "xlm-roberta",
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        **COMMON,
    },
    # A window of 4 to either side, shorter than the longest input.
    "modernbert": {
        "model_type": "modernbert",
        "max_position_embeddings": 64,
        "local_attention": 8,
        "global_attn_every_n_layers": 3,
        "pad_token_id": 0,
        **COMMON,
    },
    "nomic": {"model_type": "nomic_bert", "max_position_embeddings": 64, "type_vocab_size": 2, **COMMON},
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **COMMON,
    },
    "rank": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "num_labels": 1,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        **COMMON,
    },
    "rank_roberta": {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaForSequenceClassification"],
        "num_labels": 1,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        **COMMON,
    },
}


def weight(name: str, shape: tuple[int, ...]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Norms near 1, all else around 0; different in every tensor."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    places = np.arange(int(np.prod(shape)), dtype=np.float64)
    wave = np.sin(places * 12.9898 + seed % 1000) * 43758.5453
    noise = wave - np.floor(wave) - 0.5
    values = 1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.6 * noise
    return values.reshape(shape).astype(np.float32)


def main(minilm: str) -> None:
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    model = SentenceTransformer(minilm, device="cpu")
    found: dict[str, Any] = {"minilm": rounded(model.encode(TEXTS))}
    for name, config in CONFIGS.items():
        ranks = name.startswith("rank")
        kind = transformers.AutoModelForSequenceClassification if ranks else transformers.AutoModel
        made = kind.from_config(transformers.AutoConfig.for_model(**config)).eval()
        with torch.no_grad():
            for key, tensor in made.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.from_numpy(weight(key, tuple(tensor.shape))))
            shapes = {key: list(t.shape) for key, t in made.state_dict().items() if t.is_floating_point()}
            if ranks:  # the first input's tokens from the third on are the second text
                types = [[0 if i < 2 or "roberta" in name else 1 for i in range(len(ids))] for ids in IDS]
                vectors = [
                    torch.sigmoid(made(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits[0])
                    for ids, kinds in zip(IDS, types, strict=True)
                ]
            else:
                hidden = [made(torch.tensor([ids])).last_hidden_state[0] for ids in IDS]
                vectors = [h[-1] if name == "qwen3" else h.mean(0) for h in hidden]
                vectors = [v / v.norm() for v in vectors]
        found[name] = {"shapes": shapes, "vectors": rounded(torch.stack(vectors).numpy())}
    Path(__file__).with_name("embeddings.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def rounded(vectors: Any) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in vector] for vector in vectors]


if __name__ == "__main__":
    main(sys.argv[1])
