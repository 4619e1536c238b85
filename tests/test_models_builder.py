"""The model builder itself: its models load, run and say different things, and are the same each time."""

import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import KINDS, build_model, train_tokenizer

ROOT = Path(__file__).parent.parent


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_and_varies(kind: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = build_model(kind, tmp_path / kind)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits

    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, config = load_model(folder)
    assert config["vocab_size"] == train_tokenizer().get_vocab_size()
    outputs = []
    for prompt in ("The capital of France", "Alice was"):
        cache = make_prompt_cache(model)
        tokens = mx.array([train_tokenizer().encode(prompt).ids])
        output = []
        for _ in range(24):
            token = mx.argmax(model(tokens, cache=cache)[0, -1]).item()
            output.append(token)
            tokens = mx.array([[token]])
        assert len(set(output)) > 8
        outputs.append(output)
    assert outputs[0] != outputs[1]


def test_the_same_seed_gives_the_same_files_in_another_process(tmp_path: Path) -> None:
    here = digest(build_model("llama", tmp_path / "here", seed=3))
    code = (
        "import sys; from pathlib import Path; from tests.models import build_model;"
        "build_model('llama', Path(sys.argv[1]), seed=3)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], cwd=ROOT, check=True)
    assert digest(tmp_path / "there") == here
    assert digest(build_model("llama", tmp_path / "other", seed=4)) != here


def test_sizes_can_be_overridden(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path, hidden_size=128, num_hidden_layers=4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_attention_heads"] * config["head_dim"]) == (4, 128)
