"""What an answer is made of, once its markers are read: the words between the parsers of ``lmx.chat`` and the faces.

Pure data. A parser gives these for pieces of text as they come; put together they are the same for every split.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; calls are numbered from 0 and never overlap."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the call's arguments: put together, they are the JSON text of an object."""

    index: int
    json: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole. One that never ends was cut (``finish_reason`` length)."""

    index: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """What looked like a call is none and is given as ``Content``; for the log."""

    reason: str


Event = Content | Reasoning | CallStart | CallArguments | CallEnd | Malformed
