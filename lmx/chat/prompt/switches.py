"""How much a model is to think, in the words of its chat template.

Templates agree on no name and no values. Pure; ``ChatModel`` calls it with what its template reads,
``lmx.api.core.prepare`` gathers what the client said, in whatever spelling.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

EFFORTS: Final = ("minimal", "low", "medium", "high", "xhigh", "max")
"""Rising; "none" is none at all."""
_ON_OR_OFF: Final = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
_HOW_MUCH: Final = ("reasoning_effort", "thinking_effort", "reasoning_strength")
_NOT_AT_ALL: Final = ("none", "no_think")
_TOKENS: Final = ("thinking_budget", "reasoning_budget")


@dataclass(frozen=True, slots=True)
class Switches:
    enabled: bool | None = None
    effort: str | None = None
    """One of ``EFFORTS`` or none, or what else a client may hope that its template knows."""
    budget: int | None = None
    """Tokens of thinking at most."""

    @property
    def on(self) -> bool | None:
        """Whether to think, from whatever was said: an explicit word wins over an effort, that over a budget."""
        if self.enabled is not None:
            return self.enabled
        if self.effort is not None:
            return self.effort != "none"
        return None if self.budget is None else self.budget != 0


def template_variables(switches: Switches, variables: Collection[str], strings: Collection[str]) -> dict[str, Any]:
    """A value for each name that a template reads. ``strings``: in the template; they tell the efforts it knows."""
    given: dict[str, Any] = {}
    if switches.on is not None:
        given |= {name: switches.on for name in _ON_OR_OFF if name in variables}
    if "thinking_mode" in variables and switches.on is not None:
        mode = "enabled" if switches.on else "disabled"
        given |= {"thinking_mode": mode} if mode in strings else {}
    effort = _known_effort(switches, strings, has_switch=bool(given))
    if effort is not None:
        given |= {name: effort for name in _HOW_MUCH if name in variables}
    budget = 0 if switches.on is False else switches.budget
    if budget is not None:
        given |= {name: budget for name in _TOKENS if name in variables}
    return given


def _known_effort(switches: Switches, strings: Collection[str], *, has_switch: bool) -> str | None:
    """The wanted one, or the nearest that the template knows: some refuse others, some were never trained on them."""
    known = [effort for effort in EFFORTS if effort in strings]
    off = next((word for word in _NOT_AT_ALL if word in strings), None)
    if len(known) < 2 and off is None:  # only the default one is spelled out, as in gpt-oss's
        known = ["low", "medium", "high"]
    if switches.on is False:
        return off or (None if has_switch else known[0])
    wanted = switches.effort
    if wanted not in EFFORTS or not known:
        return None if wanted == "none" else wanted
    return min(known, key=lambda effort: abs(EFFORTS.index(effort) - EFFORTS.index(wanted)))
