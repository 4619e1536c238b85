"""Request fields that would constrain or change the answer and that lmx does not honour: each is refused by its name.

Clients take such a field for a guarantee, so dropping it in silence is worse than an error. The names are OpenAI's and
those of the servers whose clients come here: vLLM, SGLang, llama.cpp's server, LM Studio, mlx-lm, Ollama, TGI,
text-generation-webui, Aphrodite, KoboldCpp, OpenRouter, Mistral, Hugging Face's generate(). Fields that only describe
(``metadata``, ``store``, ``service_tier``, ``cache_salt`` …) are not here: they are ignored. Pure; called by
``lmx.api.core.parse``. A field that gets built moves from here into ``lmx.api.core.schemas``.
"""

from functools import cache
from typing import Any

from lmx.api.core.shorten import shorten
from lmx.errors import InvalidRequest

LONGEST_NAME = 50
Neutral = tuple[Any, ...]
"""The values, besides null, that ask for what lmx does anyway."""

NOTHING: Neutral = (False, "", [], {})
ZERO: Neutral = (0, False)
TRUE: Neutral = (True,)

_GROUPS: tuple[tuple[str, Neutral, str], ...] = (
    # Constrained output
    (
        "structured_output guided_whitespace_pattern guided_decoding guided_json_object structural_tag bnf choice "
        "grammar_triggers grammar_lazy grammar_string gbnf_grammar json_mode json_object regex_pattern",
        NOTHING,
        "response_format and structured_outputs are the fields for that",
    ),
    # Which tokens may come, and what ends an answer
    (
        "allowed_token_ids allowed_tokens bad_words bad_words_ids banned_tokens custom_token_bans "
        "banned_strings logits_processors logit_processors logits_processor custom_logit_processor custom_params "
        "stop_regex suppress_tokens begin_suppress_tokens force_words_ids forced_bos_token_id forced_eos_token_id "
        "sequence_bias repetition_detection ban_eos_token eos_token_id",
        NOTHING,
        "this server chooses among all tokens; the model's own end tokens, stop and max_tokens end an answer",
    ),
    ("min_length", ZERO, "min_tokens is the field for that, and counts the answer's tokens only"),
    # Other servers' names for what is built
    (
        "n_predict num_predict max_new_tokens max_length max_output_tokens max_gen_toks max_gen_len",
        (-1,),
        "max_tokens is the field for that",
    ),
    ("stop_sequences stop_words stop_strings stopping_strings stop_token stop_tokens", NOTHING, "stop is the field"),
    ("temp", (), "temperature is the field for that"),
    ("rep_pen rep_penalty penalty_repeat repetition", (1, 0), "repetition_penalty is the field for that"),
    ("penalty_freq freq_penalty freq_pen", (0,), "frequency_penalty is the field for that"),
    ("penalty_present pres_penalty pres_pen", (0,), "presence_penalty is the field for that"),
    ("t_max_predict_ms max_time", (0, -1), "timeout is the field for that"),
    ("random_seed sampling_seed", (), "seed is the field for that"),
    (
        "options extra_body sampling_params parameters generation_config generation_kwargs extra_params nvext",
        NOTHING,
        "give its fields (temperature, top_p, seed …) in the request itself",
    ),
    ("do_sample", TRUE, "temperature 0 is the likeliest tokens"),
    # Samplers
    (
        "mirostat mirostat_mode dynatemp_range dynatemp_low dynatemp_high dynatemp_min dynatemp_max xtc_probability "
        "dry_multiplier top_a epsilon_cutoff eta_cutoff penalty_alpha no_repeat_ngram_size smoothing_factor min_keep "
        "nsigma watermark watermarking diversity_penalty skew",
        ZERO,
        "this server has no such sampler",
    ),
    (
        "typical_p typical tfs tfs_z encoder_repetition_penalty length_penalty guidance_scale num_beams beam_width "
        "num_beam_groups",
        (0, 1),
        "this server has no such sampler",
    ),
    ("top_n_sigma adaptive_target", (0, -1), "this server has no such sampler"),
    (
        "use_beam_search dynamic_temperature temperature_last early_stopping negative_prompt samplers sampler_order "
        "sampler_priority sampler_seq",
        NOTHING,
        "this server has no such sampler, and a fixed order of those it has",
    ),
    # What comes back
    (
        "return_prompt_logprobs logprob_token_ids top_logprobs_num logprob_start_len return_logprob "
        "decoder_input_details token_ids_logprob",
        (False, [], -1),
        "logprobs, top_logprobs and prompt_logprobs are the fields for that",
    ),
    (
        "return_tokens return_tokens_as_token_ids return_prompt_text return_hidden_states "
        "return_routed_experts return_full_text details response_fields "
        "post_sampling_probs return_meta_info return_progress",
        NOTHING,
        "this server does not return that",
    ),
    ("n_probs", ZERO, "logprobs is the field for that"),
    ("n_indent", ZERO, "this server does not do that"),
    ("skip_special_tokens", TRUE, "special tokens are never part of the text"),
    ("detokenize", TRUE, "answers are text"),
    ("audio", NOTHING, "the models here write text only"),
    ("modalities", (["text"], []), "the models here write text only"),
    ("web_search_options", (), "this server searches nothing"),
    ("verbosity", ("medium",), "ask for it in a message"),
    # What goes in
    (
        "truncate_prompt_tokens truncate truncation_length max_input_tokens",
        (False, -1, 0),
        "this server never cuts a prompt",
    ),
    ("truncation", ("disabled", "none", False), "this server never cuts a prompt"),
    ("transforms safe_prompt", NOTHING, "this server never changes a prompt"),
    ("plugins integrations mcp_servers", NOTHING, "this server has none"),
    ("context_overflow_policy", ("stopAtLimit", ""), "this server never cuts a prompt"),
    ("num_ctx n_ctx context_length", (0, -1), "[model] context_length in lmx.toml is the setting for that"),
    (
        "chat_template documents template system system_prompt instructions input previous_response_id conversation "
        "raw instruction_template input_ids input_embeds prompt_embeds context",
        NOTHING,
        "a prompt is made of messages by the model's own template, or is the field prompt",
    ),
    (
        "image_data images videos mm_processor_kwargs multi_modal_data",
        NOTHING,
        "the models here read text only",
    ),
    (
        "normalize normalise pooling add_special_tokens",
        TRUE,
        "embeddings are pooled, normalised and tokenised as the model's files say",
    ),
    ("embd_normalize", (2,), "embeddings are normalised as the model's files say"),
    ("lora lora_path lora_request adapters adapter adapter_id", NOTHING, "this server loads no adapters"),
    ("vllm_xargs", NOTHING, "this server knows none of them"),
    # Reasoning
    ("prompt_mode", (), "reasoning_effort is the field for that"),
)
_FIELDS = {name: (neutral, why) for names, neutral, why in _GROUPS for name in names.split()}
_PENALTY_WINDOWS = ("repeat_last_n", "penalty_last_n", "repetition_context_size", "repetition_penalty_range")


def refuse_unbuilt(body: dict[str, Any], built: frozenset[str]) -> None:
    """Raises InvalidRequest for a field of ``body`` that asks for something that is not built, or that is one of the
    ``built`` ones spelled otherwise (``maxTokens``, ``top-p``).
    """
    for name in body.keys() - _FIELDS.keys() - built:
        meant = _spellings(built).get(_letters(name)) if len(name) < LONGEST_NAME else None
        if meant is not None and body[name] is not None:
            raise _refusal(name, body[name], f"the field is spelled {meant}")
    for name in (body.keys() & _FIELDS.keys()) - built:
        neutral, why = _FIELDS[name]
        value = body[name]
        if value is not None and not any(_same(value, harmless) for harmless in neutral):
            raise _refusal(name, value, why)
    penalises = any(body.get(name) not in (None, 1) for name in ("repetition_penalty", "repeat_penalty"))
    for name in _PENALTY_WINDOWS:
        if penalises and body.get(name) not in (None, -1):
            raise _refusal(name, body[name], "the repetition penalty looks at the whole prompt and answer")


@cache
def _spellings(built: frozenset[str]) -> dict[str, str]:
    return {_letters(name): name for name in (*_FIELDS, *built)}


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _same(value: Any, neutral: Any) -> bool:
    """1 and 1.0 are the same number, 0 and False are not the same."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(name: str, value: Any, why: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is not supported (got {shorten(value)}): {why}. Leave it out.", param=name)
