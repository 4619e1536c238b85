"""How long a sequence may get with the KV there is. Pure arithmetic, shared by the back ends, so that a setting means
the same on both."""

from dataclasses import dataclass

from lmx.errors import ModelInvalid

QUANTUM_TOKENS = 256
"""The scheduler counts KV in whole quanta of this many tokens."""


@dataclass(frozen=True, slots=True)
class KVCost:
    """What a sequence's KV costs."""

    bytes_per_token: int
    """0: nothing grows with the tokens."""
    bytes_per_sequence: int
    """Beside the tokens' own: recurrent state, a sliding window."""


def fit_context(cost: KVCost, own_context: int, asked_context: int, budget_bytes: int) -> int:
    """The longest prompt plus answer in tokens: the model's own limit, the one asked for (0: none), or, in whole
    quanta, what the budget holds.

    Raises ModelInvalid when a context that was asked for does not fit, or nothing useful does.
    """
    wanted = min(own_context, asked_context or own_context)
    if not cost.bytes_per_token:
        return wanted
    fits = (budget_bytes - cost.bytes_per_sequence) // cost.bytes_per_token // QUANTUM_TOKENS * QUANTUM_TOKENS
    if fits < QUANTUM_TOKENS:
        raise ModelInvalid(
            f"a KV budget of {budget_bytes} bytes holds no {QUANTUM_TOKENS} tokens of this model "
            f"({cost.bytes_per_token} bytes a token, {cost.bytes_per_sequence} a sequence); raise [engine] "
            "kv_budget_bytes.",
            param="engine.kv_budget_bytes",
        )
    if fits < wanted and asked_context:
        raise ModelInvalid(
            f"a context of {wanted} tokens needs {wanted * cost.bytes_per_token + cost.bytes_per_sequence} bytes of "
            f"KV; the budget is {budget_bytes}, which holds {fits} tokens. Lower [model] context_length, or raise "
            "[engine] kv_budget_bytes if the machine has the memory.",
            param="model.context_length",
        )
    return min(wanted, fits)


# Attention's temporaries may take this share of the memory that weights and KV leave, and at least so much of what the
# weights leave: a chunk must go on even where a setting gave all of it to the KV.
_ATTENTION_SHARE = 0.5
_LEAST_SHARE = 0.05


def chunk_area(attention_bytes: float, free_bytes: int, kv_budget_bytes: int) -> int:
    """How many tokens times context prefill may compute in one step, so that its attention fits into the memory; 0: any
    number. ``attention_bytes``: what it takes for each; ``free_bytes``: what the weights leave."""
    if not attention_bytes:
        return 0
    room = max(_ATTENTION_SHARE * (free_bytes - kv_budget_bytes), _LEAST_SHARE * free_bytes)
    return max(int(room / attention_bytes), 1)
