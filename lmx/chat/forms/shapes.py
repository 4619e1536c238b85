"""What a JSON schema admits, as shapes: each one JSON type with all its constraints at once.

The words between ``lmx.chat.forms.reading``, which reads schemas into lists of shapes (any one of them will do), and
``lmx.chat.forms.writing``, which writes them as the schemas that llguidance takes exactly. Pure. Subschemas stay unread
until they are needed: a shape holds them as conjunctions of places, so that recursive schemas are finite.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeVar

from lmx.chat.forms.patterns import matches, none_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A subschema, where it stands in the client's document."""

    schema: Any = field(compare=False)
    base: str = field(compare=False)
    """URI of the resource it is part of: what its ``$ref``s are relative to."""
    path: str
    negated: bool = False
    """It is what must *not* hold."""


Conjunction = tuple[Place, ...]
"""All of them must hold; the empty one admits anything."""

NEVER = (Place(False, "", "false"),)


class Unsupported(Exception):
    """This cannot be said in a grammar. The arguments are the keyword and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    path: str = field(default="", compare=False)
    """Where the schema stands that began it, for messages."""
    values: tuple[Any, ...] | None = None
    """From ``enum`` and ``const``: one of these, as far as the other constraints admit it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Null(Shape):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Boolean(Shape):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Shape):
    low: Fraction | None = None
    low_open: bool = False
    high: Fraction | None = None
    high_open: bool = False
    integer: bool = False
    step: Fraction | None = None

    def admits(self, value: Fraction) -> bool:
        return (
            (self.low is None or value > self.low or (value == self.low and not self.low_open))
            and (self.high is None or value < self.high or (value == self.high and not self.high_open))
            and not (self.integer and value.denominator != 1)
            and not (self.step is not None and (value / self.step).denominator != 1)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class String(Shape):
    low: int = 0
    high: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Array(Shape):
    prefix: tuple[Conjunction, ...] = ()
    items: Conjunction = ()
    """What follows the prefix."""
    low: int = 0
    high: int | None = None
    unique: bool = False

    def at(self, index: int) -> Conjunction:
        return self.prefix[index] if index < len(self.prefix) else self.items


@dataclass(frozen=True, slots=True, kw_only=True)
class Object(Shape):
    properties: Mapping[str, Conjunction] = field(default_factory=dict)
    patterns: Mapping[str, Conjunction] = field(default_factory=dict)
    additional: Conjunction | None = None
    """What neither ``properties`` nor ``patterns`` name; None: nobody said."""
    names: Conjunction = ()
    required: tuple[str, ...] = ()
    low: int = 0
    high: int | None = None

    def at(self, name: str) -> Conjunction:
        own = self.properties.get(name)
        matching = [places for pattern, places in self.patterns.items() if matches(pattern, name)]
        if own is None and not matching:
            return self.additional or ()
        found = own or ()
        for places in matching:
            found = _union(found, places)
        return found


ANYTHING: tuple[Shape, ...] = (Null(), Boolean(), Number(), String(), Array(), Object())


def fraction(value: int | float) -> Fraction:
    """The number as it is written in JSON: 0.1 is a tenth."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(value))


def identity(value: Any) -> Hashable:
    """Equal for what JSON calls equal: 1 is 1.0 and not true."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int | float):
        return fraction(value)
    if isinstance(value, list):
        return "array", tuple(map(identity, value))
    if isinstance(value, dict):
        return "object", frozenset((key, identity(member)) for key, member in value.items())
    hashable: Hashable = value  # a text or None
    return hashable


def kind(value: Any) -> type[Shape]:
    if value is None:
        return Null
    if isinstance(value, bool):
        return Boolean
    if isinstance(value, str):
        return String
    return Array if isinstance(value, list) else Object if isinstance(value, dict) else Number


def meet(one: Shape, other: Shape) -> Shape | None:
    """What both admit; None where that is certainly nothing."""
    values = _meet_values(one.values, other.values)
    if type(one) is not type(other) or values == ():
        return None
    one = replace(one, values=values)
    if isinstance(one, Number) and isinstance(other, Number):
        return _meet_numbers(one, other)
    if isinstance(one, String) and isinstance(other, String):
        return _possible(
            replace(
                one,
                low=max(one.low, other.low),
                high=_least(one.high, other.high),
                patterns=_union(one.patterns, other.patterns),
                formats=_union(one.formats, other.formats),
            )
        )
    if isinstance(one, Array) and isinstance(other, Array):
        length = max(len(one.prefix), len(other.prefix))
        return _possible(
            replace(
                one,
                prefix=tuple(_union(one.at(index), other.at(index)) for index in range(length)),
                items=_union(one.items, other.items),
                low=max(one.low, other.low),
                high=_least(one.high, other.high),
                unique=one.unique or other.unique,
            )
        )
    if isinstance(one, Object) and isinstance(other, Object):
        return _meet_objects(one, other)
    return one


def _meet_values(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    both = set(map(identity, other))
    return tuple(value for value in one if identity(value) in both)


def _possible(shape: String | Array) -> Shape | None:
    low, high = shape.low, shape.high
    if high is not None and low > high:
        return None
    if shape.values is None:
        return shape
    values = tuple(value for value in shape.values if low <= len(value) and (high is None or len(value) <= high))
    return replace(shape, values=values) if values else None


def _meet_numbers(one: Number, other: Number) -> Number | None:
    low, low_open = max(
        ((shape.low, shape.low_open) for shape in (one, other) if shape.low is not None), default=(None, False)
    )
    high, closed = min(
        ((shape.high, not shape.high_open) for shape in (one, other) if shape.high is not None), default=(None, True)
    )
    step = one.step or other.step if one.step is None or other.step is None else common_multiple(one.step, other.step)
    shape = replace(
        one,
        low=low,
        low_open=low_open,
        high=high,
        high_open=not closed,
        integer=one.integer or other.integer,
        step=step,
    )
    if low is not None and high is not None and (low > high or (low == high and not shape.admits(low))):
        return None
    if shape.integer and low is not None and high is not None:
        first = math.floor(low) + 1 if low_open else math.ceil(low)
        last = math.ceil(high) - 1 if not closed else math.floor(high)
        if first > last:
            return None
    if shape.values is None:
        return shape
    values = tuple(value for value in shape.values if shape.admits(fraction(value)))
    return replace(shape, values=values) if values else None


def common_multiple(one: Fraction, other: Fraction) -> Fraction:
    denominator = math.lcm(one.denominator, other.denominator)
    return Fraction(math.lcm(int(one * denominator), int(other * denominator)), denominator)


def _meet_objects(one: Object, other: Object) -> Object | None:
    names = dict.fromkeys([*one.properties, *other.properties])
    additional = (
        None if one.additional is other.additional is None else _union(one.additional or (), other.additional or ())
    )
    shape = replace(
        one,
        properties={name: _union(one.at(name), other.at(name)) for name in names},
        patterns={
            pattern: _union(
                one.patterns.get(pattern, one.additional or ()), other.patterns.get(pattern, other.additional or ())
            )
            for pattern in dict.fromkeys([*one.patterns, *other.patterns])
        },
        additional=additional,
        names=_union(one.names, other.names),
        required=_union(one.required, other.required),
        low=max(one.low, other.low),
        high=_least(one.high, other.high),
    )
    if shape.high is not None and max(shape.low, len(shape.required)) > shape.high:
        return None
    return shape


def _least(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else min(one, other)


def _union(one: tuple[T, ...], other: tuple[T, ...]) -> tuple[T, ...]:
    return one if not other else other if not one else tuple(dict.fromkeys((*one, *other)))


def complement(shape: Shape, given: Shape) -> Iterator[Shape]:
    """What the shape does not admit, of values of its type that ``given`` admits. Raises Unsupported."""
    if shape.values is not None:
        yield from _other_values(shape)
        return
    if isinstance(shape, Number) and isinstance(given, Number):
        if shape.step not in (None, given.step) or (shape.integer and not given.integer):
            raise Unsupported("multipleOf" if shape.step is not None else "type", "numbers between cannot be said")
        if shape.low is not None:
            yield Number(high=shape.low, high_open=not shape.low_open)
        if shape.high is not None:
            yield Number(low=shape.high, low_open=not shape.high_open)
    elif isinstance(shape, String) and isinstance(given, String):
        if not set(shape.patterns).issubset(given.patterns) or not set(shape.formats).issubset(given.formats):
            raise Unsupported("pattern" if shape.patterns else "format", "texts that do not match cannot be said")
        yield from _other_sizes(String(), shape.low, shape.high)
    elif isinstance(shape, Array) and isinstance(given, Array):
        if not set(shape.items).issubset(given.items) or (shape.unique and not given.unique):
            raise Unsupported("items", "that some item differs cannot be said")
        yield from _other_sizes(Array(), shape.low, shape.high)
        for index, places in enumerate(shape.prefix):
            for place in places:
                yield Array(prefix=(*((),) * index, (opposite(place),)), low=index + 1)
    elif isinstance(shape, Object) and isinstance(given, Object):
        open_ended = shape.patterns or not set(shape.additional or ()).issubset(given.additional or ())
        if open_ended or not set(shape.names).issubset(given.names):
            raise Unsupported("additionalProperties", "that some property differs cannot be said")
        yield from _other_sizes(Object(), shape.low, shape.high)
        for name in shape.required:
            yield Object(properties={name: NEVER})
        for name, places in shape.properties.items():
            for place in places:
                yield Object(properties={name: (opposite(place),)}, required=(name,))


def _other_values(shape: Shape) -> Iterator[Shape]:
    values = shape.values or ()
    if isinstance(shape, Boolean):
        rest = tuple({True, False}.difference(values))
        if rest:
            yield Boolean(values=rest)
    elif isinstance(shape, String):
        yield String(patterns=(none_of(values),))
    elif isinstance(shape, Number):
        bounds = [None, *sorted({fraction(value) for value in values}), None]
        for low, high in pairwise(bounds):
            yield Number(low=low, low_open=True, high=high, high_open=True)
    elif not isinstance(shape, Null):
        raise Unsupported("const", "that an array or an object differs cannot be said")


def _other_sizes(shape: "String | Array | Object", low: int, high: int | None) -> Iterator[Shape]:
    if low:
        yield replace(shape, high=low - 1)
    if high is not None:
        yield replace(shape, low=high + 1)


def opposite(place: Place) -> Place:
    return replace(place, negated=not place.negated)
