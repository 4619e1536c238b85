"""What each layer of a model keeps of a sequence, from config.json or GGUF metadata alone.

The rules are those of mlx-lm's model code and of llama.cpp; a test holds them against the caches that mlx-lm makes for
every architecture it has. One that is not named here keeps keys and values in every layer, which is right for most, and
for a hybrid that is new more than it takes. Pure; called by ``lmx.hub.shape``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps."""

    kv: tuple[tuple[int, int], ...] = ()
    """Of each position: heads and width, of keys, of values, and of whatever else."""
    window: int = 0
    """Positions that a sliding layer sees; 0: all. MLX keeps all of them all the same, llama.cpp only these."""
    state: int = 0
    """Numbers of a recurrent state, one for each sequence."""


def first(config: Config, *names: str, default: Any = 0) -> Any:
    """The first of these that the configuration sets."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def count(config: Config) -> int:
    return int(first(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers"))


def width(config: Config) -> int:
    return int(first(config, "hidden_size", "n_embd", "d_model", "dim", "model_dim", "hidden_dim"))


def heads(config: Config) -> int:
    return int(first(config, "num_attention_heads", "n_head", "n_heads", "num_heads", default=1))


def _head_width(config: Config) -> int:
    return int(config.get("head_dim") or config.get("attention_head_dim") or width(config) // heads(config))


# Their code knows no shared key heads, whatever the configuration says.
_UNSHARED = ("gpt2", "gpt_neox", "gptj", "phixtral", "qwen", "talkie")


def _kv_heads(config: Config) -> int:
    kind = config.get("model_type")
    if kind in _UNSHARED:
        return heads(config)
    if kind in ("gpt_bigcode", "recurrent_gemma"):
        return 1 if config.get("multi_query", True) else heads(config)
    inner = config.get("attn_config") or {}
    found = first(config, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups", default=None)
    if found is None:
        found = first(inner, "kv_n_heads", default=None)
    return heads(config) if found is None or isinstance(found, list) else int(found)


def _attention(config: Config) -> Layer:
    return Layer(((_kv_heads(config), _head_width(config)),) * 2)


def _latent(config: Config) -> Layer:
    """DeepSeek's: one compressed vector for all heads, and the rotated part of the keys."""
    return Layer(((1, config["kv_lora_rank"]), (1, config["qk_rope_head_dim"])))


def _unfolded(config: Config) -> Layer:
    """The same attention in code that keeps every head's keys and values."""
    keys = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return Layer(((heads(config), keys), (heads(config), config["v_head_dim"])))


def _indexed(config: Config) -> Layer:
    """DeepSeek's sparse attention: the keys that choose are kept as well (and values that nobody reads)."""
    return Layer(_latent(config).kv + ((1, config["index_head_dim"]),) * 2)


# --- recurrent states ---------------------------------------------------------------------------------


def _selective(config: Config) -> int:
    """Mamba's."""
    inner = int(
        first(config, "mamba_expand", "expand") * width(config)
        if config["model_type"] == "jamba"
        else config.get("intermediate_size") or first(config, "expand", default=2) * width(config)
    )
    kernel, states = first(config, "mamba_d_conv", "conv_kernel"), first(config, "mamba_d_state", "state_size")
    return int((kernel - 1) * inner + inner * states)


def _selective2(config: Config) -> int:
    """Mamba 2's, under all the names that it has."""
    plain = config["model_type"] == "mamba2"
    number = config["num_heads"] if plain else first(config, "mamba_n_heads", "mamba_num_heads")
    size = config["head_dim"] if plain else first(config, "mamba_d_head", "mamba_head_dim", "hidden_size_per_head")
    inner = number * size
    states = first(config, "mamba_d_state", "ssm_state_size", "state_size")
    kernel = first(config, "mamba_d_conv", "conv_kernel")
    groups = first(config, "mamba_n_groups", "n_groups", default=1)
    mixed = inner if config["model_type"] == "plamo2" else inner + 2 * groups * states
    return int((kernel - 1) * mixed + inner * states)


def _delta(config: Config) -> int:
    """Gated DeltaNet's (Qwen3-Next)."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    convolved = (config["linear_conv_kernel_dim"] - 1) * (2 * keys + values)
    return int(convolved + values * config["linear_key_head_dim"])


def _kimi_delta(config: Config) -> int:
    inner = config.get("linear_attn_config") or {}
    number, size = (
        first(inner, "num_heads", default=heads(config)),
        first(inner, "head_dim", default=_head_width(config)),
    )
    kernel = first(inner, "short_conv_kernel_size", default=config.get("short_conv_kernel_size", 4))
    return int(3 * (kernel - 1) * number * size + number * size * size)


def _linear(config: Config) -> int:
    return heads(config) * _head_width(config) ** 2


def _short_convolution(config: Config) -> int:
    return int((first(config, "conv_L_cache", default=3) - 1) * width(config))


def _gated(config: Config) -> int:
    """RecurrentGemma's."""
    return int(first(config, "conv1d_width", default=4) * (config.get("lru_width") or width(config)))


def _rwkv(config: Config) -> int:
    return 2 * width(config) + width(config) * _head_width(config)


# --- which layer is which -----------------------------------------------------------------------------

Recurrent = Callable[[Config, int, int], bool]
"""Whether layer ``i`` of ``n`` keeps a state instead of keys and values."""


def _named(config: Config, i: int, n: int) -> bool:
    types = first(config, "block_types", "_block_types", "layers_block_type", "layer_types", default=[])
    return bool(types) and "attention" not in str(types[i % len(types)]).replace("linear_attention", "linear")


def _interval(config: Config, i: int, n: int) -> bool:
    return bool((i + 1) % first(config, "full_attention_interval", default=4))


def _grouped(config: Config, i: int, n: int) -> bool:
    group = int(first(config, "layer_group_size", default=1))
    return bool((i + 1) % group) and i < n // group * group


def _jamba(config: Config, i: int, n: int) -> bool:
    if config.get("layers_block_type"):
        return _named(config, i, n)
    return bool(i % config["attn_layer_period"] != config["attn_layer_offset"])


def _plamo(config: Config, i: int, n: int) -> bool:
    step = first(config, "mamba_step", default=2)
    return i != n - 1 if n <= step // 2 else bool(i % step != step // 2)


def _kda(config: Config, i: int, n: int) -> bool:
    return i + 1 in (config.get("linear_attn_config") or {}).get("kda_layers", ())


def _lfm(config: Config, i: int, n: int) -> bool:
    chosen = config.get("full_attn_idxs")
    return _named(config, i, n) if chosen is None else i not in chosen


def _always(config: Config, i: int, n: int) -> bool:
    return True


_ATTENTION: dict[str, Callable[[Config], Layer]] = {
    **dict.fromkeys(
        (
            "bailing_hybrid",
            "bailing_moe_v3",
            "deepseek_v3",
            "glm4_moe_lite",
            "kimi_k25",
            "kimi_k3",
            "kimi_linear",
            "kimi_vl",
            "longcat_flash",
            "longcat_flash_ngram",
            "mistral4",
        ),
        _latent,
    ),
    **dict.fromkeys(("deepseek_v2", "minicpm3", "youtu_llm"), _unfolded),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _indexed),
}
_RECURRENT: dict[str, tuple[Callable[[Config], int], Recurrent]] = {
    "bailing_hybrid": (_linear, _grouped),
    "bailing_moe_linear": (_linear, _grouped),
    "bailing_moe_v3": (_kimi_delta, _grouped),
    "granitemoehybrid": (_selective2, _named),
    "jamba": (_selective, _jamba),
    "kimi_k3": (_kimi_delta, _kda),
    "kimi_linear": (_kimi_delta, _kda),
    "lfm2": (_short_convolution, _lfm),
    "lfm2-vl": (_short_convolution, _lfm),
    "lfm2_moe": (_short_convolution, _lfm),
    "mamba": (_selective, _always),
    "mamba2": (_selective2, _always),
    "olmo_hybrid": (_delta, _named),
    "plamo2": (_selective2, _plamo),
    "qwen3_5": (_delta, _interval),
    "qwen3_5_moe": (_delta, _interval),
    "qwen3_next": (_delta, _interval),
    "recurrent_gemma": (_gated, _named),
    "rwkv7": (_rwkv, _always),
}
_TWICE = ("longcat_flash", "longcat_flash_ngram", "iquestloopcoder")
_SHARED = {"afm7": "num_kv_reuse_layers", "gemma3n": "num_kv_shared_layers", "gemma4": "num_kv_shared_layers"}
_SHARED["gemma4_text"] = _SHARED["gemma4"]


# Configurations whose model_type names no code of its own.
_RENAMED = {"falcon_mamba": "mamba", "kimi_k2": "deepseek_v3"}


def of_config(config: Config) -> tuple[Layer, ...]:
    """Of mlx-lm's model of this configuration; ``config``: with what its ``text_config`` says."""
    kind, n = str(config.get("model_type", "")), count(config)
    kind = _RENAMED.get(kind, kind)
    if kind.removesuffix("_text") in (*_RECURRENT, *_ATTENTION):
        kind = kind.removesuffix("_text")
    config = {**config, "model_type": kind}
    attention = _ATTENTION.get(kind, _attention)
    if kind == "nemotron_h":
        return tuple(_nemotron(config))
    if kind == "nemotron-nas":
        return tuple(_searched(config, attention(config)))
    if kind in ("falcon_h1", "baichuan_m1"):
        layer = attention(config)
        state = _selective2(config) if kind == "falcon_h1" else sum(head * size for head, size in layer.kv)
        return (Layer(layer.kv, state=state),) * n
    if kind == "mimo_v2_flash":
        return tuple(_mimo(config))
    if kind in ("gemma4", "gemma4_text"):
        return tuple(_gemma4(config, n))
    if kind in _RECURRENT:
        states, is_recurrent = _RECURRENT[kind]
        return tuple(Layer(state=states(config)) if is_recurrent(config, i, n) else attention(config) for i in range(n))
    if kind in _SHARED:
        n -= int(first(config, _SHARED[kind]))
    if kind == "nanbeige":
        n *= int(first(config, "num_loops", default=1))
    layers = (attention(config),) * n
    return layers * 2 if kind in _TWICE else layers


def _nemotron(config: Config) -> list[Layer]:
    pattern: Sequence[str] = config.get("hybrid_override_pattern") or [
        {"mamba": "M", "attention": "*"}.get(str(name), "-")
        for name in first(config, "layers_block_type", "layer_types", default=[])
    ]
    kept = {"M": Layer(state=_selective2(config)), "*": _attention(config)}
    return [kept[letter] for letter in pattern if letter in kept]


def _searched(config: Config, full: Layer) -> list[Layer]:
    """Each layer with key heads of its own, or without attention."""
    layers = []
    for block in config.get("block_configs") or []:
        attention = block.get("attention") or {}
        if not (attention.get("no_op") or attention.get("replace_with_linear")):
            group = attention.get("n_heads_in_group") or 1
            layers.append(Layer(((heads(config) // group, full.kv[0][1]),) * 2))
    return layers


def _mimo(config: Config) -> list[Layer]:
    full = Layer(
        ((config["num_key_value_heads"], config["head_dim"]), (config["num_key_value_heads"], config["v_head_dim"]))
    )
    few = config["swa_num_key_value_heads"]
    sliding = Layer(((few, config["swa_head_dim"]), (few, config["swa_v_head_dim"])), config["sliding_window_size"])
    return [sliding if slides else full for slides in config["hybrid_layer_pattern"]]


def _gemma4(config: Config, n: int) -> list[Layer]:
    pattern = int(first(config, "sliding_window_pattern", default=5))
    types = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(n)
    ]
    few = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    wide = Layer(((few or _kv_heads(config), config.get("global_head_dim") or _head_width(config)),) * 2)
    window = int(first(config, "sliding_window"))
    sliding = Layer(_attention(config).kv, window)
    own = n - int(first(config, "num_kv_shared_layers"))
    return [wide if kind == "full_attention" else sliding for kind in types[:own]]


# --- GGUF ---------------------------------------------------------------------------------------------

# llama.cpp's own patterns: every so many layers one sees everything; where a file does not say it otherwise.
_WINDOWED = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "smallthinker": 4,
}
_WHOLLY_RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
_BOTH = ("falcon-h1",)


def of_gguf(architecture: str, own: Callable[..., Any]) -> tuple[Layer, ...]:
    """Of llama.cpp's model; ``own(key, default)``: metadata of the architecture's own."""
    n, number = int(own("block_count", 0)), own("attention.head_count", 1)
    natural = int(own("embedding_length", 0)) // max(_one(number), 1)
    keys, values = int(own("attention.key_length", natural)), int(own("attention.value_length", natural))
    latent = own("attention.key_length_mla", 0)
    kv_heads = own("attention.head_count_kv", number)
    state = _gguf_state(own)
    interval = own("full_attention_interval", 4 if architecture in ("qwen3next", "qwen35", "qwen35moe") else 0)
    window = int(own("attention.sliding_window", 0))
    pattern = own("attention.sliding_window_pattern", _WINDOWED.get(architecture, 0))
    layers = []
    for i in range(n - int(own("nextn_predict_layers", 0))):
        few = kv_heads[i] if isinstance(kv_heads, list) else kv_heads
        slides = bool(pattern[i % len(pattern)]) if isinstance(pattern, list) and pattern else False
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 1:
            slides = i % pattern < pattern - 1
        recurrent = architecture in _WHOLLY_RECURRENT or (
            state > 0 and (bool((i + 1) % interval) if interval else few == 0)
        )
        if recurrent:
            layers.append(Layer(state=state))
        elif latent:  # the latent vector and the rotated part, and no values
            layers.append(Layer(((1, keys),)))
        elif few:
            kv = ((int(few), keys), (int(few), values))
            layers.append(Layer(kv, window if slides else 0, state if architecture in _BOTH else 0))
    return tuple(layers)


def _one(value: Any) -> int:
    return int(max(value)) if isinstance(value, list) else int(value)


def _gguf_state(own: Callable[..., Any]) -> int:
    wide = int(own("embedding_length", 0))
    if cache := own("shortconv.l_cache", 0):
        return (int(cache) - 1) * wide
    if size := own("wkv.head_size", 0):
        return int(own("token_shift_count", 2)) * wide + wide * int(size)
    inner, states = int(own("ssm.inner_size", 0)), int(own("ssm.state_size", 0))
    mixed = inner + 2 * int(own("ssm.group_count", 0)) * states
    return max(int(own("ssm.conv_kernel", 1)) - 1, 0) * mixed + inner * states
