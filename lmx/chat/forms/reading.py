"""Reads a JSON schema, of any draft, into shapes: what its keywords say together, worked out.

Pure; called by ``lmx.chat.forms.writing``, which asks for one subschema after the other, by its place.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any, Final, TypeVar
from urllib.parse import urljoin

from lmx.chat.forms.limits import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_NAME_PATTERNS,
    MAX_PATTERNS,
    MAX_PROPERTIES,
    MAX_SHAPES,
    MAX_WORK,
    Refused,
    TooComplex,
    at,
)
from lmx.chat.forms.patterns import MAX_UNROLLED, fault, translated, unrolled
from lmx.chat.forms.references import References
from lmx.chat.forms.shapes import (
    ANYTHING,
    NEVER,
    Array,
    Boolean,
    Conjunction,
    Null,
    Number,
    Object,
    Place,
    Shape,
    String,
    Unsupported,
    complement,
    fraction,
    kind,
    meet,
    opposite,
)

FORMATS: Final = frozenset(["duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
"""Those that llguidance enforces. Others are annotations, as JSON Schema has it by default."""
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    r"(?:(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
TIMES: Final = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Formats in our own words: llguidance's have a February of 29 days in every year, and endless fractions."""
TYPES: Final = {
    "null": Null(),
    "boolean": Boolean(),
    "number": Number(),
    "integer": Number(integer=True),
    "string": String(),
    "array": Array(),
    "object": Object(),
}
Shapes = tuple[Shape, ...]
Expected = TypeVar("Expected", list[Any], dict[str, Any], str)
UNKNOWN: Final = {
    "unevaluatedItems": "what other keywords left over cannot be said; use items: false",
    "contentSchema": "what is inside a text cannot be constrained; use an object",
}


class Reader:
    """Of one schema. lenient: a keyword that cannot be said is left out. Raises Refused and TooComplex."""

    def __init__(self, schema: Any, *, lenient: bool) -> None:
        self._root = schema
        self._lenient = lenient
        self._references = References(schema)
        self._read: dict[Place, Shapes] = {}
        self._reading: set[Place] = set()
        self._work = 0
        self._patterns: set[str] = set()

    def root(self) -> Place:
        base = self._root.get("$id", "") if isinstance(self._root, dict) else ""
        return Place(self._root, base if isinstance(base, str) else "", "")

    def refuse(self, keyword: str, path: str, reason: str) -> None:
        if not self._lenient:
            raise Refused(keyword, path, reason)

    def shapes(self, places: Conjunction) -> Shapes:
        """What admits what all of the places do: any one of them will do."""
        try:
            return self._shapes(places)
        except Unsupported as problem:
            inner, reason = problem.args
            denied = next(place for place in places if place.negated)
            self.refuse("not", denied.path, f"it would negate {inner}, and {reason}")
            return self.shapes(tuple(place for place in places if place != denied))

    def nothing(self, shape: Shape) -> bool:
        """Whether nothing satisfies the shape for certain; looks one level into required properties."""
        if isinstance(shape, Object):
            return any(self.empty(shape.at(name)) for name in shape.required)
        if isinstance(shape, Array):
            return any(self.empty(shape.at(index)) for index in range(min(shape.low, len(shape.prefix) + 1)))
        return False

    def empty(self, places: Conjunction) -> bool:
        if any(place in self._reading for place in places):
            return False
        try:
            return not self._shapes(places)
        except Unsupported:
            return False

    def _shapes(self, places: Conjunction) -> Shapes:
        result = ANYTHING
        for place in places:
            result = self._meet(result, self._of(place))
        return result

    def _meet(self, one: Shapes, other: Shapes) -> Shapes:
        if one is ANYTHING or other is ANYTHING:
            return other if one is ANYTHING else one
        if len(one) * len(other) > MAX_SHAPES**2:
            raise TooComplex(_multiplied(one[0]))
        met = (meet(left, right) for left in one for right in other if type(left) is type(right))
        found = tuple(shape for shape in met if shape is not None)
        self._worked(found)
        if len(found) > MAX_SHAPES:
            raise TooComplex(_multiplied(found[0]))
        return found

    def _worked(self, found: Iterable[Shape]) -> None:
        self._work += sum(1 + len(shape.properties) if isinstance(shape, Object) else 1 for shape in found)
        if self._work > MAX_WORK:
            raise TooComplex("to work out what its parts admit together takes too long")

    def _of(self, place: Place) -> Shapes:
        known = self._read.get(place)
        if known is not None:
            return known
        if place in self._reading:
            raise Refused("$ref", place.path, "it leads back to itself without anything in between")
        if len(self._reading) > MAX_DEPTH:
            raise TooComplex(f"at {at(place.path)} more than {MAX_DEPTH} schemas are inside each other")
        self._reading.add(place)
        try:
            shapes = self._without(ANYTHING, opposite(place)) if place.negated else self._straight(place)
        finally:
            self._reading.discard(place)
        self._read[place] = shapes
        return shapes

    def _without(self, shapes: Shapes, place: Place) -> Shapes:
        """What of the shapes the place does not admit. Raises Unsupported."""
        for shape in self._of(place):
            left: list[Shape] = []
            for given in shapes:
                if type(given) is type(shape):
                    left += (met for other in complement(shape, given) if (met := meet(given, other)) is not None)
                else:
                    left.append(given)
            if len(left) > MAX_SHAPES:
                raise TooComplex(_multiplied(place))
            self._worked(left)
            shapes = tuple(left)
        return shapes

    def _straight(self, place: Place) -> Shapes:
        schema = place.schema
        if isinstance(schema, bool):
            return ANYTHING if schema else ()
        if not isinstance(schema, dict):
            raise Refused("schema", place.path, "a schema is an object, true or false")
        if isinstance(schema.get("$id"), str) and place.path:
            place = replace(place, base=urljoin(place.base, schema["$id"]))
        for keyword, reason in UNKNOWN.items():
            if schema.get(keyword, True) is not True:
                self.refuse(keyword, f"{place.path}/{keyword}", reason)
        result = ANYTHING
        for keyword in _in_order(schema):
            if keyword == "properties":
                result = self._meet(result, self._typed(schema, place))
                continue
            try:
                result = _APPLICATORS[keyword](self, result, place, keyword)
            except Unsupported as problem:
                inner, reason = problem.args
                self.refuse(keyword, f"{place.path}/{keyword}", f"it would negate {inner}, and {reason}")
        if "unevaluatedProperties" in schema:
            left_over = (self._child(place, "unevaluatedProperties"),)
            result = tuple(
                replace(shape, additional=left_over)
                if isinstance(shape, Object) and shape.additional is None
                else shape
                for shape in result
            )
        if schema.get("nullable") is True and "type" in schema:
            result = (*result, Null(path=place.path))
        return result

    def _child(self, place: Place, *keys: str | int) -> Place:
        schema = place.schema
        for key in keys:
            schema = schema[key]
        steps = "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
        return Place(schema, place.base, place.path + steps)

    def _children(self, place: Place, keyword: str) -> list[Place]:
        members = _expect(list, place, keyword)
        return [self._child(place, keyword, index) for index in range(len(members))]

    def _named(self, place: Place, keyword: str) -> dict[str, Place]:
        members = _expect(dict, place, keyword)
        return {name: self._child(place, keyword, name) for name in members}

    def _typed(self, schema: Mapping[str, Any], place: Place) -> Shapes:
        if not _TYPED.intersection(schema):
            return ANYTHING
        wanted = schema.get("type")
        names = wanted if isinstance(wanted, list) else [wanted]
        if wanted is None:
            shapes = list(ANYTHING)
        elif not names or any(not isinstance(name, str) or name not in TYPES for name in names):
            raise Refused("type", f"{place.path}/type", f"it must be one or more of {', '.join(TYPES)}")
        else:
            names = [name for name in names if not (name == "integer" and "number" in names)]
            shapes = [TYPES[name] for name in dict.fromkeys(names)]
        given = ((shape, self._constrained(replace(shape, path=place.path), schema, place)) for shape in shapes)
        return tuple(met for shape, constrained in given if (met := meet(constrained, shape)) is not None)

    def _constrained(self, shape: Shape, schema: Mapping[str, Any], place: Place) -> Shape:
        if isinstance(shape, Number):
            return self._number(shape, schema, place)
        if isinstance(shape, String):
            return self._string(shape, schema, place)
        if isinstance(shape, Array):
            return self._array(shape, schema, place)
        if isinstance(shape, Object):
            return self._object(shape, schema, place)
        return shape

    def _number(self, shape: Number, schema: Mapping[str, Any], place: Place) -> Number:
        low, high = _bound(place, "minimum"), _bound(place, "maximum")
        low_open = high_open = False
        below, above = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        if isinstance(below, bool):  # draft 4
            low_open = below
        elif below is not None:
            bound = _bound(place, "exclusiveMinimum")
            if bound is not None and (low is None or bound >= low):
                low, low_open = bound, True
        if isinstance(above, bool):
            high_open = above
        elif above is not None:
            bound = _bound(place, "exclusiveMaximum")
            if bound is not None and (high is None or bound <= high):
                high, high_open = bound, True
        step = _bound(place, "multipleOf")
        if step is not None and step <= 0:
            raise Refused("multipleOf", f"{place.path}/multipleOf", "it must be a number above 0")
        return replace(shape, low=low, low_open=low_open, high=high, high_open=high_open, step=step)

    def _string(self, shape: String, schema: Mapping[str, Any], place: Place) -> String:
        low, high = _count(place, "minLength") or 0, _count(place, "maxLength")
        patterns: list[str | None] = []
        if "pattern" in schema:
            patterns.append(self._pattern(_expect(str, place, "pattern"), f"{place.path}/pattern"))
        wanted = schema.get("format")
        if isinstance(wanted, str) and wanted in TIMES:
            patterns.append(TIMES[wanted])
        return replace(
            shape,
            low=low,
            high=high,
            patterns=tuple(pattern for pattern in patterns if pattern is not None),
            formats=(wanted,) if isinstance(wanted, str) and wanted in FORMATS else (),
        )

    def _array(self, shape: Array, schema: Mapping[str, Any], place: Place) -> Array:
        low, high = _count(place, "minItems") or 0, _count(place, "maxItems")
        old = isinstance(schema.get("items"), list)
        prefix: list[Conjunction] = []
        if old or "prefixItems" in schema:
            prefix = [(item,) for item in self._children(place, "items" if old else "prefixItems")]
        rest = "additionalItems" if old else "items"
        items: Conjunction = (self._child(place, rest),) if schema.get(rest, True) is not True else ()
        if "contains" in schema:
            wanted = self._child(place, "contains")
            at_least, at_most = _count(place, "minContains"), _count(place, "maxContains")
            at_least = 1 if at_least is None else at_least
            if at_least > MAX_ITEMS:
                raise TooComplex(f"at {at(place.path)}/minContains it wants more than {MAX_ITEMS} items")
            prefix += [items] * (at_least - len(prefix))
            for index in range(at_least):
                prefix[index] = (*prefix[index], wanted)
            if at_most is not None:
                if at_most < at_least:
                    low, high = 1, 0
                prefix = [*prefix[:at_least], *((*item, opposite(wanted)) for item in prefix[at_least:])]
                items = (*items, opposite(wanted))
            low = max(low, at_least)
        unique = schema.get("uniqueItems") is True
        return replace(shape, prefix=tuple(prefix), items=items, low=low, high=high, unique=unique)

    def _object(self, shape: Object, schema: Mapping[str, Any], place: Place) -> Object:
        properties = self._named(place, "properties") if "properties" in schema else {}
        given = self._named(place, "patternProperties") if "patternProperties" in schema else {}
        if len(given) > MAX_NAME_PATTERNS:
            raise TooComplex(f"at {at(place.path)} more than {MAX_NAME_PATTERNS} patterns name properties")
        patterns = [(self._pattern(pattern, child.path), child) for pattern, child in given.items()]
        required = _expect(list, place, "required") if isinstance(schema.get("required"), list) else []
        if not all(isinstance(name, str) for name in required):
            raise Refused("required", f"{place.path}/required", "it must be a list of names")
        if len(properties) > MAX_PROPERTIES or len(required) > MAX_PROPERTIES:
            raise TooComplex(f"at {at(place.path)} more than {MAX_PROPERTIES} properties are named")
        additional = schema.get("additionalProperties")
        return replace(
            shape,
            properties={name: (child,) for name, child in properties.items()},
            patterns={pattern: (child,) for pattern, child in patterns if pattern is not None},
            additional=None if additional is None else (self._child(place, "additionalProperties"),),
            names=(self._child(place, "propertyNames"),) if schema.get("propertyNames", True) is not True else (),
            required=tuple(dict.fromkeys(required)),
            low=_count(place, "minProperties") or 0,
            high=_count(place, "maxProperties"),
        )

    def _pattern(self, pattern: str, path: str) -> str | None:
        """The pattern as llguidance takes it; None where it cannot and is left out."""
        self._patterns.add(pattern)
        if len(self._patterns) > MAX_PATTERNS:
            raise TooComplex(f"it has more than {MAX_PATTERNS} patterns")
        taken = translated(pattern)
        if (size := unrolled(taken)) > MAX_UNROLLED:
            raise TooComplex(f"at {at(path)}/pattern {pattern[:80]!r} repeats {size:,} characters")
        problem = fault(taken)
        if problem:
            self.refuse("pattern", path, f"{pattern[:80]!r}: {problem}")
            return None
        return taken

    # Applicators: keywords that say something about the value as a whole.

    def _enum(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        values = _expect(list, place, keyword) if keyword == "enum" else [place.schema[keyword]]
        kinds: dict[type[Shape], list[Any]] = {}
        for value in values:
            kinds.setdefault(kind(value), []).append(value)
        return self._meet(result, tuple(shape(values=tuple(all), path=place.path) for shape, all in kinds.items()))

    def _all_of(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        return self._meet(result, self._shapes(tuple(self._children(place, keyword))))

    def _any_of(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        return self._meet(result, _either(self._of(child) for child in self._children(place, keyword)))

    def _one_of(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        children = self._children(place, keyword)
        if len(children) > MAX_SHAPES:
            raise TooComplex(f"at {at(place.path)}/oneOf more than {MAX_SHAPES} branches are to be kept apart")
        branches = [self._meet(result, self._of(child)) for child in children]
        parts = list(branches)
        for (one, left), (other, right) in combinations(enumerate(branches), 2):
            if all(self.nothing(met) for met in self._meet(left, right)):
                continue
            try:
                without = self._without(parts[one], children[other]), self._without(parts[other], children[one])
            except Unsupported as problem:
                inner, reason = problem.args
                self.refuse(
                    keyword,
                    f"{place.path}/{keyword}",
                    f"branches {one} and {other} overlap, and what only one of them admits would negate {inner}: "
                    f"{reason}; use anyOf, or give the branches a property with different constants",
                )
            else:
                parts[one], parts[other] = without
        return _either(parts)

    def _not(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        return self._without(result, self._child(place, keyword))

    def _if(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        if not {"then", "else"}.intersection(place.schema):
            return result
        condition = self._child(place, keyword)
        then, otherwise = (
            (self._child(place, branch),) if branch in place.schema else () for branch in ("then", "else")
        )
        return _either(
            [
                self._meet(result, self._shapes((condition, *then))),
                self._without(self._meet(result, self._shapes(otherwise)), condition),
            ]
        )

    def _dependent(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        others = tuple(shape for shape in ANYTHING if not isinstance(shape, Object))
        for name, wanted in _expect(dict, place, keyword).items():
            without = Object(properties={name: NEVER}, path=place.path)
            if isinstance(wanted, list):
                required = tuple(dict.fromkeys([name, *(key for key in wanted if isinstance(key, str))]))
                present: Shapes = (Object(required=required, path=place.path),)
            else:
                schema = self._of(self._child(place, keyword, name))
                present = self._meet((Object(required=(name,), path=place.path),), schema)
            result = self._meet(result, (*others, without, *present))
        return result

    def _dynamic_ref(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        if self._references.anchors() > 1:
            self.refuse(keyword, f"{place.path}/{keyword}", "with several $dynamicAnchors in the schema; use $ref")
            return result
        return self._ref(result, place, keyword)

    def _ref(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        target = self._references.target(_expect(str, place, keyword), place, keyword)
        return self._meet(result, self._of(target))


_APPLICATORS: Final[dict[str, Callable[[Reader, Shapes, Place, str], Shapes]]] = {
    "enum": Reader._enum,
    "const": Reader._enum,
    "allOf": Reader._all_of,
    "anyOf": Reader._any_of,
    "oneOf": Reader._one_of,
    "not": Reader._not,
    "if": Reader._if,
    "dependentRequired": Reader._dependent,
    "dependentSchemas": Reader._dependent,
    "dependencies": Reader._dependent,
    "$ref": Reader._ref,
    "$dynamicRef": Reader._dynamic_ref,
    "$recursiveRef": Reader._ref,
}
_TYPED: Final = {
    *("type", "pattern", "format", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains"),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties"),
    *("required", "minProperties", "maxProperties"),
}


_LAST: Final = frozenset(["oneOf", "not", "if"])
"""What negates stands last: what the others leave is easier to say without something."""


def _in_order(schema: Mapping[str, Any]) -> list[str]:
    """Its applicators, and "properties" for every other keyword, as they stand: the order of properties in answers."""
    found = [keyword for keyword in schema if keyword in _APPLICATORS or keyword == "properties"]
    found = found if "properties" in found else ["properties", *found]
    return sorted(found, key=_LAST.__contains__)


def _multiplied(where: Shape | Place) -> str:
    return f"at {at(where.path)} its alternatives, multiplied out, are more than {MAX_SHAPES}"


def _either(branches: Iterable[Shapes]) -> Shapes:
    found: list[Shape] = []
    for shapes in branches:
        if shapes is ANYTHING:
            return ANYTHING
        found += shapes
    return tuple(found)


def _expect(wanted: type[Expected], place: Place, keyword: str) -> Expected:
    given = place.schema[keyword]
    if not isinstance(given, wanted):
        raise Refused(keyword, f"{place.path}/{keyword}", f"it must be {_KINDS[wanted]}")
    return given


_KINDS: Final[dict[type, str]] = {list: "an array", dict: "an object", str: "a string"}


def _count(place: Place, keyword: str) -> int | None:
    given = place.schema.get(keyword)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or given < 0 or given != int(given):
        raise Refused(keyword, f"{place.path}/{keyword}", "it must be a whole number, 0 or more")
    return int(given)


def _bound(place: Place, keyword: str) -> Fraction | None:
    given = place.schema.get(keyword)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise Refused(keyword, f"{place.path}/{keyword}", "it must be a number")
    return fraction(given)
