"""One small random model for every architecture of the installed mlx-lm, built from a small configuration.

``SMALL`` gives every model the same small numbers under the names that their configurations use; ``SPECIAL`` adds what
a single architecture needs beside it. ``NOT_BUILT`` says why the others are left out. tests/test_architectures.py holds
the three against what mlx-lm has.
"""

import importlib
import json
import math
import pkgutil
import zlib
from pathlib import Path
from typing import Any

LAYERS = 4
WINDOW = 8
VOCABULARY = 96

_ATTENTION = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # widths
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": LAYERS,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 30.0,
    # GPT-2's names
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 96,
    "n_ctx": 512,
    "n_positions": 512,
    "rotary_dim": 8,
    "num_layers": LAYERS,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # windows
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "sliding_window_pattern": 2,
    "layer_types": _ATTENTION,
    # linear attention and state spaces
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "state_size": 16,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_conv_bias": True,
    "time_step_rank": 8,
    "time_step_limit": [0.001, 100.0],
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "conv_L_cache": 3,
    "conv_bias": False,
}

_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
_CONV = ["conv", "full_attention"] * (LAYERS // 2)
_KDA = {
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 3],
        "full_attn_layers": [2, 4],
    }
}
_ROPE = {kind: {"rope_theta": 1e4, "rope_type": "default"} for kind in ("sliding_attention", "full_attention")}

SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_heads": 4, "num_kv_heads": 2, "num_kv_reuse_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "bailing_moe": {"rotary_dim": None},
    "bailing_moe_v3": {"short_conv_kernel_size": 4},
    "dbrx": {
        "d_model": 64,
        "n_layers": LAYERS,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"factor": 1.0, "type": "dynamic", "alpha": 1000.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": {**_KDA, "model_max_length": 512},
    "kimi_k3": {**_KDA},
    "lfm2": {
        "layer_types": _CONV,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": _CONV, "use_expert_bias": True},
    "lille-130m": {"block_size": 512, "n_kv_heads": 2},
    "llama4": {
        "attention_chunk_size": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "rope_scaling": None,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "intermediate_size": 128},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0},
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 5,
        "block_configs": [
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "nemotron_h": {"layer_types": None, "hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo_hybrid": {"layer_types": _LINEAR, "linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": LAYERS,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 4, 4],
        "num_kv_heads": [2, 2, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.0],
    },
    "phi3small": {
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "dense_attention_every_n_layers": 2,
        # It always masks the ids of some unused tokens.
        "vocab_size": 100352,
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64, "num_heads": 4},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16},
    "qwen": {"kv_channels": 16},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {"rope_parameters": _ROPE},
    "mellum": {"rope_parameters": _ROPE},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm4_moe": {"rope_scaling": None},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "dense_intermediate_size": 96,
        "layer_types": None,
        "sparse_attention_config": {
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 16,
            "sparse_block_size": 4,
            "sparse_topk_blocks": 2,
            "sparse_local_block": 1,
            "sparse_attention_freq": [0, 1, 0, 1],
        },
    },
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "type": "yarn",
            "factor": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        }
    },
    "deepseek_v2": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "minicpm3": {
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "rope_scaling": {"original_max_position_embeddings": 128, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    },
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_local_base_freq": 1e4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
    },
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {"num_attention_groups": 2},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "muse_spark": {
        "rope_parameters": {"rope_theta": 1e4},
        "layer_rope_theta": [1e4, 0, 1e4, 0],
        "post_norm_eps": 1e-5,
        "output_multiplier": 0.5,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {"rope_theta": 1e4},
    },
}
SPECIAL["gemma4"] = SPECIAL["gemma4_text"]
SPECIAL["lfm2-vl"] = SPECIAL["lfm2"]
SPECIAL["granitemoe"] = SPECIAL["granite"]
SPECIAL["granitemoehybrid"] |= SPECIAL["granite"]
SPECIAL["longcat_flash_ngram"] = SPECIAL["longcat_flash"]

NOT_BUILT: dict[str, str] = {
    "olmo": "needs the package ai2-olmo; its module ends the process that imports it without",
    "prism_hadamard_qwen35": "its published packs only: 2-bit weights with a manifest of every packed module",
}


def modules() -> list[str]:
    """Every module of mlx_lm.models that a model_type can name."""
    import mlx_lm.models

    found = []
    for module in sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__)):
        source = Path(mlx_lm.models.__path__[0], f"{module}.py").read_text(encoding="utf-8")
        if "class Model(" in source:
            found.append(module)
    return found


def build(module: str, folder: Path) -> Path:
    """Write the small model of this architecture into ``folder`` and return it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    code = importlib.import_module(f"mlx_lm.models.{module}")
    values = {**SMALL, **SPECIAL.get(module, {})}
    config = {"model_type": module, **values, "text_config": {"model_type": module, **values}}
    model = code.Model(code.ModelArgs.from_dict(json.loads(json.dumps(config))))
    rng = mx.random.key(zlib.crc32(module.encode()))
    weights = {}
    for name, initial in tree_flatten(model.parameters()):
        if not mx.issubdtype(initial.dtype, mx.floating):
            weights[name] = initial
            continue
        rng, key = mx.random.split(rng)
        noise = mx.random.normal(initial.shape, key=key)
        if initial.ndim < 2:
            weights[name] = initial + 0.1 * noise
        else:
            scale = 0.3 if "emb" in name or "wte" in name else 1.5 / math.sqrt(initial.shape[-1])
            weights[name] = scale * noise
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
