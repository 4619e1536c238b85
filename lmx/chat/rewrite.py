"""A client's JSON schema, of any draft, as one that llguidance takes and means the same by.

llguidance compiles a part of JSON Schema exactly, refuses another, and dies of a third (a chain of 2,000 ``$ref``s ends
the process). So every schema is read here into shapes (``lmx.chat.shapes``), where conjunctions, disjunctions and
negations are worked out, and written again with nothing but ``anyOf``, ``enum``, ``$ref`` and one type's own keywords.
What comes out may admit less than the schema (numbers have bounded digits, what ``contains`` wants comes first, an
object has no properties that nobody speaks of), never more. Pure; called by ``lmx.chat.schema``.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations, permutations
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urldefrag, urljoin

from lmx.chat.patterns import MAX_UNROLLED, fault, matches, translated, unrolled
from lmx.chat.shapes import (
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
    common_multiple,
    complement,
    fraction,
    kind,
    meet,
    opposite,
)

MAX_NODES: Final = 20_000
"""Subschemas written. llguidance takes 50,000, in its own count."""
MAX_WORK: Final = 300_000
"""Properties and alternatives brought together: about a second."""
MAX_SHAPES: Final = 256
"""Alternatives of one subschema, after everything is multiplied out."""
MAX_DEPTH: Final = 64
"""Subschemas inside each other. llguidance needs 2.5 kB of stack for each; the process dies where that is not there."""
MAX_PROPERTIES: Final = 2000
MAX_PATTERNS: Final = 200
MAX_MATCHED: Final = 2000
"""Constants of one ``enum`` beside a pattern: each is tried."""
MAX_NAME_PATTERNS: Final = 16
"""Of one object: llguidance holds each against each other."""
MAX_ITEMS: Final = 10_000
MAX_STEP: Final = 1000
"""Of ``multipleOf``, in units of its last digit: llguidance keeps a state for each remainder. 123,456,789 takes all
memory there is, 9,973 more fuel than a mask may cost."""
MAX_LENGTH: Final = 100_000
MAX_UNIQUE: Final = 4
MAX_COMBINATIONS: Final = 64
MAX_INTEGER: Final = 2**63 - 1024
"""The largest float that is an int64: 19 digits. Every integer in an answer is within it."""
MAX_NUMBER: Final = 10**15
"""Numbers that are not integers: 15 digits before the point, nine after it, no exponent."""
SMALLEST_STEP: Final = Fraction(1, 10**9)
INLINE_DEPTH: Final = 16
"""Subschemas further inside stand in ``$defs``: JSON parsers count brackets."""

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
_UNWRITABLE: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
Expected = TypeVar("Expected", list[Any], dict[str, Any], str)
UNKNOWN: Final = {
    "unevaluatedItems": "what other keywords left over cannot be said; use items: false",
    "contentSchema": "what is inside a text cannot be constrained; use an object",
}


class Refused(Exception):
    """The arguments are the keyword, its path in the schema, and the reason with the way out."""

    def __init__(self, keyword: str, path: str, reason: str) -> None:
        super().__init__(keyword, path, reason)
        self.keyword = keyword
        self.path = path
        self.reason = reason


class TooComplex(Exception):
    """The schema is within what can be said but too large for that; the argument says which limit."""


def rewritten(schema: Any, *, within: Any = True, lenient: bool = False) -> dict[str, Any] | bool:
    """The schema for llguidance, with ``$defs``; False: nothing satisfies it.

    within: another schema that must hold, too. lenient: a keyword that cannot be said is left out. Raises Refused and
    TooComplex.
    """
    return _Rewriter(schema, lenient).whole(within)


class _Rewriter:
    def __init__(self, schema: Any, lenient: bool) -> None:
        self._root = schema
        self._lenient = lenient
        self._read: dict[Place, Shapes] = {}
        self._reading: set[Place] = set()
        self._written: dict[frozenset[Place], Any] = {}
        self._writing: set[frozenset[Place]] = set()
        self._names: dict[frozenset[Place], str] = {}
        self._defs: dict[str, Any] = {}
        self._nodes = 0
        self._work = 0
        self._patterns: set[str] = set()

    @cached_property
    def _resources(self) -> dict[str, tuple[Any, str]]:
        return dict(_resources(self._root))

    def whole(self, within: Any) -> dict[str, Any] | bool:
        base = self._root.get("$id", "") if isinstance(self._root, dict) else ""
        root = Place(self._root, base if isinstance(base, str) else "", "")
        written = self._write((root,) if within is True else (root, Place(within, "", "within")), 0)
        if isinstance(written, bool):
            return written
        return {**written, "$defs": self._defs} if self._defs else written

    def _refuse(self, keyword: str, path: str, reason: str) -> None:
        if not self._lenient:
            raise Refused(keyword, path, reason)

    # Reading: places become shapes.

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
            raise TooComplex(f"at {_at(place.path)} more than {MAX_DEPTH} schemas are inside each other")
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
                self._refuse(keyword, f"{place.path}/{keyword}", reason)
        result = ANYTHING
        for keyword in _in_order(schema):
            if keyword == "properties":
                result = self._meet(result, self._typed(schema, place))
                continue
            try:
                result = _APPLICATORS[keyword](self, result, place, keyword)
            except Unsupported as problem:
                inner, reason = problem.args
                self._refuse(keyword, f"{place.path}/{keyword}", f"it would negate {inner}, and {reason}")
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
                raise TooComplex(f"at {_at(place.path)}/minContains it wants more than {MAX_ITEMS} items")
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
            raise TooComplex(f"at {_at(place.path)} more than {MAX_NAME_PATTERNS} patterns name properties")
        patterns = [(self._pattern(pattern, child.path), child) for pattern, child in given.items()]
        required = _expect(list, place, "required") if isinstance(schema.get("required"), list) else []
        if not all(isinstance(name, str) for name in required):
            raise Refused("required", f"{place.path}/required", "it must be a list of names")
        if len(properties) > MAX_PROPERTIES or len(required) > MAX_PROPERTIES:
            raise TooComplex(f"at {_at(place.path)} more than {MAX_PROPERTIES} properties are named")
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
            raise TooComplex(f"at {_at(path)}/pattern {pattern[:80]!r} repeats {size:,} characters")
        problem = fault(taken)
        if problem:
            self._refuse("pattern", path, f"{pattern[:80]!r}: {problem}")
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
            raise TooComplex(f"at {_at(place.path)}/oneOf more than {MAX_SHAPES} branches are to be kept apart")
        branches = [self._meet(result, self._of(child)) for child in children]
        parts = list(branches)
        for (one, left), (other, right) in combinations(enumerate(branches), 2):
            if all(self._nothing(met) for met in self._meet(left, right)):
                continue
            try:
                without = self._without(parts[one], children[other]), self._without(parts[other], children[one])
            except Unsupported as problem:
                inner, reason = problem.args
                self._refuse(
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
        anchors = sum("$dynamicAnchor" in schema for schema, _ in self._resources.values() if isinstance(schema, dict))
        if anchors > 1:
            self._refuse(keyword, f"{place.path}/{keyword}", "with several $dynamicAnchors in the schema; use $ref")
            return result
        return self._ref(result, place, keyword)

    def _ref(self, result: Shapes, place: Place, keyword: str) -> Shapes:
        target = self._target(_expect(str, place, keyword), place, keyword)
        return self._meet(result, self._of(target))

    def _target(self, reference: str, place: Place, keyword: str) -> Place:
        address, fragment = urldefrag(urljoin(place.base, reference) if place.base else reference)
        schema, path = self._resources.get(address, (None, ""))
        found = address in self._resources
        base = address
        if found and fragment and not fragment.startswith("/"):
            found = f"{address}#{fragment}" in self._resources
            schema, path = self._resources.get(f"{address}#{fragment}", (None, ""))
        elif found:
            for step in unquote(fragment).split("/")[1:]:
                name = step.replace("~1", "/").replace("~0", "~")
                path += f"/{step}"
                if isinstance(schema, dict) and name in schema:
                    schema = schema[name]
                elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
                    schema = schema[int(name)]
                else:
                    found = False
                    break
                if isinstance(schema, dict) and isinstance(schema.get("$id"), str):
                    base = urljoin(base, schema["$id"])
        if not found:
            raise Refused(
                keyword,
                f"{place.path}/{keyword}",
                f"{reference[:80]!r} names nothing in this schema; put the definition into its $defs",
            )
        return Place(schema, base, path)

    # Writing: shapes become schemas that llguidance takes.

    def _found(self, places: Conjunction) -> Shapes:
        try:
            return self._shapes(places)
        except Unsupported as problem:
            inner, reason = problem.args
            denied = next(place for place in places if place.negated)
            self._refuse("not", denied.path, f"it would negate {inner}, and {reason}")
            return self._found(tuple(place for place in places if place != denied))

    def _nothing(self, shape: Shape) -> bool:
        """Whether nothing satisfies the shape for certain; looks one level into required properties."""
        if isinstance(shape, Object):
            return any(self._empty(shape.at(name)) for name in shape.required)
        if isinstance(shape, Array):
            return any(self._empty(shape.at(index)) for index in range(min(shape.low, len(shape.prefix) + 1)))
        return False

    def _empty(self, places: Conjunction) -> bool:
        if any(place in self._reading for place in places):
            return False
        try:
            return not self._shapes(places)
        except Unsupported:
            return False

    def _write(self, places: Conjunction, depth: int) -> Any:
        if not places:
            return self._anything()
        key = frozenset(places)
        if key in self._writing or key in self._names:
            return {"$ref": f"#/$defs/{self._name(key)}"}
        if key in self._written:
            written = self._written[key]
            if isinstance(written, dict) and _nested(written):
                self._defs[self._name(key)] = written
                return {"$ref": f"#/$defs/{self._name(key)}"}
            return written
        if depth > MAX_DEPTH:
            raise TooComplex(f"at {_at(places[0].path)} more than {MAX_DEPTH} schemas are inside each other")
        self._writing.add(key)
        shapes = self._found(places)
        if shapes is ANYTHING:
            written = self._anything()
        else:
            options = [self._shape(shape, depth + 1) for shape in shapes if not self._nothing(shape)]
            options = [option for option in options if option is not False]
            written = {"anyOf": options} if len(options) > 1 else options[0] if options else False
        self._writing.discard(key)
        if key in self._names or (depth and depth % INLINE_DEPTH == 0 and isinstance(written, dict)):
            self._defs[self._name(key)] = written
            return {"$ref": f"#/$defs/{self._name(key)}"}
        self._written[key] = written
        return written

    def _name(self, key: frozenset[Place]) -> str:
        return self._names.setdefault(key, f"d{len(self._names)}")

    def _anything(self) -> dict[str, Any]:
        if "any" not in self._defs:
            self._defs["any"] = {}  # it holds itself
            this = {"$ref": "#/$defs/any"}
            self._defs["any"] = {
                "anyOf": [
                    {"type": "null"},
                    {"type": "boolean"},
                    self._write_number(Number()),
                    {"type": "string"},
                    {"type": "array", "items": this},
                    {"type": "object", "additionalProperties": this},
                ]
            }
        return {"$ref": "#/$defs/any"}

    def _shape(self, shape: Shape, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise TooComplex(f"it has more than {MAX_NODES} subschemas, counted where they are used")
        if shape.values is not None:
            return self._write_values(shape, depth)
        if isinstance(shape, Number):
            return self._write_number(shape)
        if isinstance(shape, String):
            return self._write_string(shape)
        if isinstance(shape, Array):
            return self._write_array(shape, depth)
        if isinstance(shape, Object):
            return self._write_object(shape, depth)
        return {"type": "null" if isinstance(shape, Null) else "boolean"}

    def _write_values(self, shape: Shape, depth: int) -> Any:
        values = [value for value in shape.values or () if _writable(value)]
        if not values:
            self._refuse(
                "enum",
                shape.path,
                "none of its values can be written (control characters, integers that no float holds)",
            )
            return False
        rest = replace(shape, values=None)
        if isinstance(rest, String) and (rest.patterns or rest.formats):
            if len(values) > MAX_MATCHED:
                raise TooComplex(f"at {_at(shape.path)} more than {MAX_MATCHED} constants are to match a pattern")
            values = [value for value in values if all(matches(pattern, value) for pattern in rest.patterns)]
            if not values or not rest.formats:
                return {"enum": values} if values else False
            return {"allOf": [{"enum": values}, self._write_string(replace(rest, patterns=()))]}
        if isinstance(rest, Array | Object) and rest != type(rest)():
            return {"allOf": [{"enum": values}, self._shape(rest, depth)]}
        return {"enum": values}

    def _write_number(self, shape: Number) -> Any:
        largest = Fraction(MAX_INTEGER if shape.integer else MAX_NUMBER)
        low, low_open, high, high_open = shape.low, shape.low_open, shape.high, shape.high_open
        if low is None or low < -largest:
            low, low_open = -largest, False
        if high is None or high > largest:
            high, high_open = largest, False
        if low > high:
            self._refuse(
                "minimum" if shape.low == low else "maximum", shape.path, f"numbers beyond {largest} are not written"
            )
            return {"type": "integer" if shape.integer else "number"}
        smallest = Fraction(1) if shape.integer else SMALLEST_STEP
        step = smallest if shape.step is None else common_multiple(shape.step, smallest)
        if not _one_decimal(step):
            self._refuse("multipleOf", f"{shape.path}/multipleOf", f"{float(step):g} is no step that can be counted in")
            step = smallest
        first, last = math.ceil(low / step), math.floor(high / step)
        first += low_open and first * step == low
        last -= high_open and last * step == high
        if first > last:
            if shape.integer or shape.step is not None:
                return False
            return {"type": "number", **_bounds(low, low_open, high, high_open)}  # a narrow range: all its digits
        if first == last:
            return {"enum": [_json_number(first * step)]}
        written: dict[str, Any] = {"type": "integer" if shape.integer else "number"}
        if shape.integer:
            written["minimum"], written["maximum"] = _inner_floats(math.ceil(first * step), math.floor(last * step))
        else:
            written |= _bounds(low, low_open, high, high_open)
        return written if shape.integer and step == 1 else {**written, "multipleOf": _json_number(step)}

    def _write_string(self, shape: String) -> Any:
        if shape.low > MAX_LENGTH:
            raise TooComplex(f"at {_at(shape.path)}/minLength it wants more than {MAX_LENGTH} characters")
        written: dict[str, Any] = {"type": "string"}
        if shape.low:
            written["minLength"] = shape.low
        if shape.high is not None:
            written["maxLength"] = min(shape.high, MAX_LENGTH)
        more = [{"pattern": pattern} for pattern in shape.patterns] + [{"format": name} for name in shape.formats]
        if more:
            written |= more[0]
        if more[1:]:
            written["allOf"] = [{"type": "string", **constraint} for constraint in more[1:]]
        return written

    def _write_array(self, shape: Array, depth: int) -> Any:
        if shape.low > MAX_ITEMS:
            raise TooComplex(f"at {_at(shape.path)}/minItems it wants more than {MAX_ITEMS} items")
        high = None if shape.high is None else min(shape.high, MAX_ITEMS)
        if shape.unique and (high is None or high > 1):
            return self._write_unique(shape, high)
        written: dict[str, Any] = {"type": "array"}
        prefix = shape.prefix if high is None else shape.prefix[:high]
        if prefix:
            written["prefixItems"] = [self._write(item, depth) for item in prefix]
        if high is None or high > len(prefix):
            written["items"] = self._write(shape.items, depth)
        if shape.low:
            written["minItems"] = shape.low
        if high is not None:
            written["maxItems"] = high
        return written

    def _write_unique(self, shape: Array, high: int | None) -> Any:
        items = self._found(shape.items)
        values = [value for item in items for value in item.values or ()]
        constant = not shape.prefix and all(item.values is not None for item in items)
        if constant and len(values) <= MAX_UNIQUE and all(map(_writable, values)):
            longest = min(len(values), len(values) if high is None else high)
            lists = [list(order) for size in range(shape.low, longest + 1) for order in permutations(values, size)]
            return {"enum": lists} if lists else False
        self._refuse(
            "uniqueItems",
            f"{shape.path}/uniqueItems",
            f"only for up to {MAX_UNIQUE} constants; leave it out and drop doubles afterwards",
        )
        return self._shape(replace(shape, unique=False), 1)

    def _write_object(self, shape: Object, depth: int) -> Any:
        shape = _closed(self._with_names(shape) if shape.names else shape)
        variants = list(self._sized(shape))
        written = [self._write_properties(variant, depth) for variant in variants if not self._nothing(variant)]
        return {"anyOf": written} if len(written) > 1 else written[0] if written else False

    def _write_properties(self, shape: Object, depth: int) -> dict[str, Any]:
        if len(shape.properties) + len(shape.required) > 2 * MAX_PROPERTIES:
            raise TooComplex(f"at {_at(shape.path)} more than {MAX_PROPERTIES} properties are named")
        written: dict[str, Any] = {"type": "object"}
        if shape.properties:
            # What patterns say of these names llguidance adds itself.
            written["properties"] = {
                name: self._write(places, depth) if places or not shape.patterns else True
                for name, places in shape.properties.items()
            }
        if shape.patterns:
            written["patternProperties"] = {
                pattern: self._write(places, depth) for pattern, places in shape.patterns.items()
            }
        written["additionalProperties"] = self._write(shape.additional or (), depth)
        if shape.required:
            written["required"] = list(shape.required)
        if shape.low > len(shape.required):
            written["minProperties"] = shape.low
        if shape.high is not None:
            written["maxProperties"] = shape.high
        return written

    def _with_names(self, shape: Object) -> Object:
        """``propertyNames`` worked into the other keywords."""
        texts = [name for name in self._found(shape.names) if isinstance(name, String)]
        listed = [value for text in texts for value in text.values or ()]

        def allowed(name: str) -> bool:
            return any(
                (text.values is None or name in text.values)
                and len(name) >= text.low
                and (text.high is None or len(name) <= text.high)
                and all(matches(pattern, name) for pattern in text.patterns)
                for text in texts
            )

        properties = {name: places if allowed(name) else NEVER for name, places in shape.properties.items()}
        for name in shape.required:
            if name not in properties and not allowed(name):
                properties[name] = NEVER
        shape = replace(shape, names=(), properties=properties)
        if shape.additional == NEVER and not shape.patterns:
            return shape
        plain = [text for text in texts if not text.formats]
        if not shape.patterns and all(text.values is not None for text in texts):
            named = {name: shape.at(name) for name in listed if name not in properties and allowed(name)}
            return replace(shape, properties={**properties, **named}, additional=NEVER)
        if not shape.patterns and len(plain) == len(texts) == 1:
            (text,) = plain
            bounded = text.low or text.high is not None
            if not text.patterns and not bounded:
                return shape
            if len(text.patterns) + bool(bounded) == 1:
                length = f"{{{text.low},{'' if text.high is None else min(text.high, MAX_LENGTH)}}}"
                pattern = text.patterns[0] if text.patterns else f"^[\\s\\S]{length}$"
                return replace(shape, patterns={pattern: shape.additional or ()}, additional=NEVER)
        self._refuse(
            "propertyNames",
            f"{shape.path}/propertyNames",
            "only one pattern, a length or an enum can be said, and not together with patternProperties",
        )
        return shape

    def _sized(self, shape: Object) -> Iterator[Object]:
        """``minProperties`` and ``maxProperties`` as objects of which every named property is required or forbidden."""
        optional = [name for name in shape.properties if name not in shape.required and not self._empty(shape.at(name))]
        required = len(shape.required)
        more = bool(shape.patterns) or not (shape.additional and self._empty(shape.additional))
        low = shape.low if shape.low > required else 0
        high = shape.high
        if high is not None and not more and high >= required + len(optional):
            high = None
        shape = replace(shape, low=low, high=high)
        if (not low and high is None) or not optional:
            yield shape
            return
        if low == required + 1 and high is None:
            for index, name in enumerate(optional):
                without = dict.fromkeys(optional[:index], NEVER)
                properties = {**shape.properties, **without}
                yield replace(shape, properties=properties, required=(*shape.required, name), low=0)
            if more:
                without = dict.fromkeys(optional, NEVER)
                yield replace(shape, properties={**shape.properties, **without})
            return
        largest = len(optional) if high is None else min(len(optional), high - required)
        sizes = range(0 if more else max(low - required, 0), largest + 1)
        if sum(math.comb(len(optional), size) for size in sizes) > MAX_COMBINATIONS:
            self._refuse(
                "minProperties" if low else "maxProperties",
                f"{shape.path}/{'minProperties' if low else 'maxProperties'}",
                f"its {len(optional)} optional properties make more than {MAX_COMBINATIONS} combinations; require more",
            )
            yield replace(shape, low=0, high=None)
            return
        for size in sizes:
            for chosen in combinations(optional, size):
                without = {other: NEVER for other in optional if other not in chosen}
                properties = {**shape.properties, **without}
                yield replace(shape, properties=properties, required=(*shape.required, *chosen))


_APPLICATORS: Final[dict[str, Callable[[_Rewriter, Shapes, Place, str], Shapes]]] = {
    "enum": _Rewriter._enum,
    "const": _Rewriter._enum,
    "allOf": _Rewriter._all_of,
    "anyOf": _Rewriter._any_of,
    "oneOf": _Rewriter._one_of,
    "not": _Rewriter._not,
    "if": _Rewriter._if,
    "dependentRequired": _Rewriter._dependent,
    "dependentSchemas": _Rewriter._dependent,
    "dependencies": _Rewriter._dependent,
    "$ref": _Rewriter._ref,
    "$dynamicRef": _Rewriter._dynamic_ref,
    "$recursiveRef": _Rewriter._ref,
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


def _at(path: str) -> str:
    return f"#{path}" if len(path) <= 100 else f"#…{path[-100:]}"


def _multiplied(where: Shape | Place) -> str:
    return f"at {_at(where.path)} its alternatives, multiplied out, are more than {MAX_SHAPES}"


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


def _resources(root: Any) -> Iterator[tuple[str, tuple[Any, str]]]:
    """What ``$ref`` may name by address: the document, and whatever has an ``$id`` or an anchor, with its path."""
    pending: list[tuple[Any, str, str]] = [(root, "", "")]
    yield "", (root, "")
    while pending:
        schema, base, path = pending.pop()
        if isinstance(schema, dict):
            own = schema.get("$id")
            if isinstance(own, str):
                base = urldefrag(urljoin(base, own))[0]
                yield base, (schema, path)
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(schema.get(keyword), str):
                    yield f"{base}#{schema[keyword]}", (schema, path)
            members: Iterable[tuple[str | int, Any]] = schema.items()
        else:
            members = enumerate(schema)
        for key, member in members:
            if isinstance(member, dict | list):
                pending.append((member, base, f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"))


def _nested(written: dict[str, Any]) -> bool:
    return not {"properties", "items", "prefixItems", "anyOf", "patternProperties", "enum"}.isdisjoint(written)


def _writable(value: Any) -> bool:
    """Whether an answer can be exactly this value: llguidance holds numbers as floats, and ``\\u`` is not written."""
    if isinstance(value, dict):
        return all(map(_writable, value)) and all(map(_writable, value.values()))
    if isinstance(value, list):
        return all(map(_writable, value))
    if isinstance(value, str):
        return _UNWRITABLE.search(value) is None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and (
            (abs(value) <= MAX_INTEGER and float(value) == value) or isinstance(value, float)
        )
    return True


def _bounds(low: Fraction, low_open: bool, high: Fraction, high_open: bool) -> dict[str, int | float]:
    return {
        "exclusiveMinimum" if low_open else "minimum": _json_number(low),
        "exclusiveMaximum" if high_open else "maximum": _json_number(high),
    }


def _json_number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def _inner_floats(low: int, high: int) -> tuple[int, int]:
    """The integers between which everything is, as floats that are no further out."""
    first, last = float(low), float(high)
    first = math.nextafter(first, math.inf) if first < low else first
    last = math.nextafter(last, -math.inf) if last > high else last
    return int(first), int(last)


def _one_decimal(step: Fraction) -> bool:
    """Whether llguidance reads the float as this decimal (it multiplies by ten until it is whole) and can count it."""
    value = float(step)
    for _ in range(18):
        if value == int(value):
            return value <= MAX_STEP
        value *= 10
    return False


def _closed(shape: Object) -> Object:
    """Where a schema names properties and does not speak of others, none is written: small models would go on and on
    with them, and who writes such a schema rarely wants any."""
    named = {name for name, places in shape.properties.items() if places != NEVER}
    silent = shape.additional is None and not shape.patterns and not shape.names
    if silent and named and named >= set(shape.required) and shape.low <= len(named):
        return replace(shape, additional=NEVER)
    return shape
