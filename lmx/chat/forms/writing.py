"""A client's JSON schema, of any draft, as one that llguidance takes and means the same by.

llguidance compiles a part of JSON Schema exactly, refuses another, and dies of a third (a chain of 2,000 ``$ref``s ends
the process). So every schema is read into shapes (``lmx.chat.forms.reading``), where conjunctions, disjunctions and
negations are worked out, and written again with nothing but ``anyOf``, ``enum``, ``$ref`` and one type's own keywords.
What comes out may admit less than the schema (numbers have bounded digits, what ``contains`` wants comes first, an
object has no properties that nobody speaks of), never more. Pure; called by ``lmx.chat.forms.schema``.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any, Final

from lmx.chat.forms.limits import (
    MAX_COMBINATIONS,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_LENGTH,
    MAX_MATCHED,
    MAX_NODES,
    MAX_PROPERTIES,
    MAX_UNIQUE,
    TooComplex,
    at,
)
from lmx.chat.forms.patterns import matches
from lmx.chat.forms.reading import Reader
from lmx.chat.forms.shapes import (
    ANYTHING,
    NEVER,
    Array,
    Conjunction,
    Null,
    Number,
    Object,
    Place,
    Shape,
    String,
    common_multiple,
)

MAX_STEP: Final = 1000
"""Of ``multipleOf``, in units of its last digit: llguidance keeps a state for each remainder. 123,456,789 takes all
memory there is, 9,973 more fuel than a mask may cost."""
MAX_INTEGER: Final = 2**63 - 1024
"""The largest float that is an int64: 19 digits. Every integer in an answer is within it."""
MAX_NUMBER: Final = 10**15
"""Numbers that are not integers: 15 digits before the point, nine after it, no exponent."""
SMALLEST_STEP: Final = Fraction(1, 10**9)
INLINE_DEPTH: Final = 16
"""Subschemas further inside stand in ``$defs``: JSON parsers count brackets."""
_UNWRITABLE: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def rewritten(schema: Any, *, within: Any = True, lenient: bool = False) -> dict[str, Any] | bool:
    """The schema for llguidance, with ``$defs``; False: nothing satisfies it.

    within: another schema that must hold, too. lenient: a keyword that cannot be said is left out. Raises Refused and
    TooComplex.
    """
    return _Writer(Reader(schema, lenient=lenient)).whole(within)


class _Writer:
    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._written: dict[frozenset[Place], Any] = {}
        self._writing: set[frozenset[Place]] = set()
        self._names: dict[frozenset[Place], str] = {}
        self._defs: dict[str, Any] = {}
        self._nodes = 0

    def whole(self, within: Any) -> dict[str, Any] | bool:
        root = self._reader.root()
        written = self._write((root,) if within is True else (root, Place(within, "", "within")), 0)
        if isinstance(written, bool):
            return written
        return {**written, "$defs": self._defs} if self._defs else written

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
            raise TooComplex(f"at {at(places[0].path)} more than {MAX_DEPTH} schemas are inside each other")
        self._writing.add(key)
        shapes = self._reader.shapes(places)
        if shapes is ANYTHING:
            written = self._anything()
        else:
            options = [self._shape(shape, depth + 1) for shape in shapes if not self._reader.nothing(shape)]
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
            self._reader.refuse(
                "enum",
                shape.path,
                "none of its values can be written (control characters, integers that no float holds)",
            )
            return False
        rest = replace(shape, values=None)
        if isinstance(rest, String) and (rest.patterns or rest.formats):
            if len(values) > MAX_MATCHED:
                raise TooComplex(f"at {at(shape.path)} more than {MAX_MATCHED} constants are to match a pattern")
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
            self._reader.refuse(
                "minimum" if shape.low == low else "maximum", shape.path, f"numbers beyond {largest} are not written"
            )
            return {"type": "integer" if shape.integer else "number"}
        smallest = Fraction(1) if shape.integer else SMALLEST_STEP
        step = smallest if shape.step is None else common_multiple(shape.step, smallest)
        if not _one_decimal(step):
            self._reader.refuse(
                "multipleOf", f"{shape.path}/multipleOf", f"{float(step):g} is no step that can be counted in"
            )
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
            raise TooComplex(f"at {at(shape.path)}/minLength it wants more than {MAX_LENGTH} characters")
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
            raise TooComplex(f"at {at(shape.path)}/minItems it wants more than {MAX_ITEMS} items")
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
        items = self._reader.shapes(shape.items)
        values = [value for item in items for value in item.values or ()]
        constant = not shape.prefix and all(item.values is not None for item in items)
        if constant and len(values) <= MAX_UNIQUE and all(map(_writable, values)):
            longest = min(len(values), len(values) if high is None else high)
            lists = [list(order) for size in range(shape.low, longest + 1) for order in permutations(values, size)]
            return {"enum": lists} if lists else False
        self._reader.refuse(
            "uniqueItems",
            f"{shape.path}/uniqueItems",
            f"only for up to {MAX_UNIQUE} constants; leave it out and drop doubles afterwards",
        )
        return self._shape(replace(shape, unique=False), 1)

    def _write_object(self, shape: Object, depth: int) -> Any:
        shape = _closed(self._with_names(shape) if shape.names else shape)
        variants = list(self._sized(shape))
        written = [self._write_properties(variant, depth) for variant in variants if not self._reader.nothing(variant)]
        return {"anyOf": written} if len(written) > 1 else written[0] if written else False

    def _write_properties(self, shape: Object, depth: int) -> dict[str, Any]:
        if len(shape.properties) + len(shape.required) > 2 * MAX_PROPERTIES:
            raise TooComplex(f"at {at(shape.path)} more than {MAX_PROPERTIES} properties are named")
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
        texts = [name for name in self._reader.shapes(shape.names) if isinstance(name, String)]
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
        self._reader.refuse(
            "propertyNames",
            f"{shape.path}/propertyNames",
            "only one pattern, a length or an enum can be said, and not together with patternProperties",
        )
        return shape

    def _sized(self, shape: Object) -> Iterator[Object]:
        """``minProperties`` and ``maxProperties`` as objects of which every named property is required or forbidden."""
        optional = [
            name for name in shape.properties if name not in shape.required and not self._reader.empty(shape.at(name))
        ]
        required = len(shape.required)
        more = bool(shape.patterns) or not (shape.additional and self._reader.empty(shape.additional))
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
            self._reader.refuse(
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
