"""What a request wants its answer to look like, in every spelling of the clients, as the grammar of its body.

Pure: the request's fields as plain data in, one typed result out, or InvalidRequest that names the field. OpenAI's
``response_format`` (and the Responses face's ``text``, Anthropic's ``output_config``), vLLM's ``structured_outputs``
and ``guided_*``, llama-server's ``grammar`` and ``json_schema``, SGLang's ``regex`` and ``ebnf``, Ollama's ``format``.
Called by ``lmx.api.core.prepare``; ``lmx.chat.forms.grammar`` puts the result behind the reasoning and beside calls.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from lmx.chat.forms.limits import TooComplex
from lmx.chat.forms.patterns import MAX_UNROLLED, escape, unrolled
from lmx.chat.forms.schema import ANY_OBJECT, OWN_LIMITS, complaint, said, strict_rule
from lmx.errors import GrammarTooComplex, InvalidRequest

MAX_GRAMMAR: Final = 2**16
"""Characters of a client's own grammar or regular expression."""
MAX_RULES: Final = 500
"""Of a client's grammar: llguidance follows rules into each other on the stack, and dies of 20,000."""
MAX_ALTERNATIVES: Final = 5000
MAX_CHOICES: Final = 5000
MAX_CHOICE: Final = 2**16
"""Characters of one: masks take time for each, 0.1 s here."""
MAX_CHOICE_CHARACTERS: Final = 2**18
OWN: Final = "body_grammar"
"""Name of the sub-grammar that is the client's own."""


@dataclass(frozen=True, slots=True)
class Body:
    """What an answer must be, behind its reasoning."""

    rules: str
    """Rules and terminals whose names begin with ``body``, in llguidance's Lark dialect; the rule ``body`` is all."""
    grammar: str = ""
    """A grammar with names of its own, which ``rules`` refer to as ``@body_grammar``."""


def body_of(fields: Mapping[str, Any]) -> Body | None:
    """What the request's fields ask for; None: free text. Fields that are None, or not about this, are passed over.

    Raises InvalidRequest: a field that asks for what cannot be, or two that ask for something.
    """
    wanted = [
        (param, make)
        for name in fields
        if fields[name] is not None and name in _FIELDS
        for param, make in _FIELDS[name](name, fields[name])
    ]
    if len(wanted) > 1:
        (one, _), (other, _) = wanted[:2]
        raise InvalidRequest(
            f"{one} and {other} both say what the answer must look like; give only one of them.", param=other
        )
    return wanted[0][1]() if wanted else None


Wanted = Iterator[tuple[str, Callable[[], Body]]]
"""The field and what makes the body of it, later: two are refused before either is compiled."""


def _response_format(param: str, given: Any) -> Wanted:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{param} must be an object with a type (got {_shown(given)}).", param=param)
    kind = given.get("type")
    if kind == "text":
        return
    if kind == "json_object":
        path, schema = f"{param}.schema", given.get("schema")  # llama-server's and Fireworks' addition
        yield param, lambda: json_body(ANY_OBJECT if schema is None else schema, path)
    elif kind == "json_schema":
        yield param, lambda: _json_schema(param, given)
    elif kind in ("grammar", "regex"):
        key = "grammar" if kind == "grammar" else "pattern"
        make = grammar_body if kind == "grammar" else regex_body
        yield param, lambda: make(given.get(key), f"{param}.{key}")
    else:
        raise InvalidRequest(
            f'{param}.type {_shown(kind)}: this server knows "text", "json_object", "json_schema", "grammar" and '
            '"regex".',
            param=f"{param}.type",
        )


def _json_schema(param: str, given: Mapping[str, Any]) -> Body:
    """OpenAI nests it under ``json_schema`` in chats, and does not in ``text.format``."""
    path, described = f"{param}.json_schema", given.get("json_schema")
    if described is None and ("schema" in given or "name" in given):
        path, described = param, given
    if not isinstance(described, Mapping):
        raise InvalidRequest(f"{path} must be an object with a schema (got {_shown(described)}).", param=path)
    strict = described.get("strict")
    if strict not in (None, True, False, "true", "false"):
        raise InvalidRequest(f"{path}.strict must be true or false (got {_shown(strict)}).", param=f"{path}.strict")
    schema = described.get("schema")
    return json_body(ANY_OBJECT if schema is None else schema, f"{path}.schema")


def _nested(param: str, given: Any) -> Wanted:
    """``text`` and ``output_config``: the format is one of their members."""
    if isinstance(given, Mapping) and given.get("format") is not None:
        yield from _response_format(f"{param}.format", given["format"])


def _structured_outputs(param: str, given: Any) -> Wanted:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{param} must be an object (got {_shown(given)}).", param=param)
    layout = _layout(given, param)
    for name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag"):
        value = given.get(name)
        if value is not None and value is not False:
            yield from _vllm(f"{param}.{name}", name, value, layout)
    for name in ("disable_additional_properties",):
        if given.get(name):
            raise InvalidRequest(
                f"{param}.{name}: this server follows the schema; set additionalProperties: false in it.",
                param=f"{param}.{name}",
            )


def _guided(param: str, given: Any) -> Wanted:
    if given is not False:
        yield from _vllm(param, param.removeprefix("guided_"), given, None)


def _vllm(param: str, name: str, value: Any, layout: Mapping[str, Any] | None) -> Wanted:
    if name == "structural_tag":
        raise InvalidRequest(
            f"{param}: this server constrains tool calls by itself; use tools and tool_choice.", param=param
        )
    if name == "json_object":
        yield param, lambda: json_body(ANY_OBJECT, param, layout)
    elif name == "json":
        yield param, lambda: json_body(_parsed(value, param), param, layout)
    else:
        make = {"regex": regex_body, "choice": choice_body, "grammar": grammar_body}[name]
        yield param, lambda: make(value, param)


def _plain(make: Callable[[Any, str], Body]) -> Callable[[str, Any], Wanted]:
    def read(param: str, given: Any) -> Wanted:
        if given != "":  # what llama-server and Ollama send for nothing
            yield param, lambda: make(given, param)

    return read


def _ollama(given: Any, param: str) -> Body:
    return json_body(ANY_OBJECT if given == "json" else _parsed(given, param), param)


_FIELDS: Final[dict[str, Callable[[str, Any], Wanted]]] = {
    "response_format": _response_format,
    "text": _nested,
    "output_config": _nested,
    "output_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _guided,
    "guided_regex": _guided,
    "guided_choice": _guided,
    "guided_grammar": _guided,
    "guided_json_object": _guided,
    "grammar": _plain(lambda given, param: grammar_body(given, param)),
    "ebnf": _plain(lambda given, param: grammar_body(given, param)),
    "regex": _plain(lambda given, param: regex_body(given, param)),
    "json_schema": _plain(lambda given, param: json_body(_parsed(given, param), param)),
    "format": _plain(_ollama),
}
FIELDS: Final = frozenset(_FIELDS)
"""The request fields that ``body_of`` reads."""


def json_body(schema: Any, param: str, layout: Mapping[str, Any] | None = None) -> Body:
    """JSON that the schema admits."""
    return Body(f"body: {strict_rule(schema, param, layout)}\n")


def choice_body(choices: Any, param: str) -> Body:
    """One of these texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequest(f"{param} must be a list of texts (got {_shown(choices)}).", param=param)
    if len(choices) > MAX_CHOICES:
        raise GrammarTooComplex(f"{param} has {len(choices)} texts; this server takes {MAX_CHOICES}.", param=param)
    longest, characters = max(map(len, choices)), sum(map(len, choices))
    if longest > MAX_CHOICE or characters > MAX_CHOICE_CHARACTERS:
        raise GrammarTooComplex(
            f"{param} has texts of up to {longest:,} characters, {characters:,} in all; this server takes "
            f"{MAX_CHOICE:,} and {MAX_CHOICE_CHARACTERS:,}.",
            param=param,
        )
    ways = "|".join("".join(map(escape, choice)) for choice in dict.fromkeys(choices))
    return _checked(Body(f"body: BODY\nBODY: /(?:{ways})/\n"), param)


def regex_body(pattern: Any, param: str) -> Body:
    """Text that the regular expression describes from its first character to its last."""
    text = _text(pattern, param)
    _check_unrolled(unrolled(text), param)
    return _checked(Body(f"body: BODY\nBODY: /{regex_to_lark(text, 'd')}/\n"), param)


def grammar_body(grammar: Any, param: str) -> Body:
    """Text of the language of a grammar in llama.cpp's GBNF or llguidance's Lark dialect."""
    text = _text(grammar, param)
    _check_rules(text.count("::="), text.count("|"), param)  # of GBNF, whose conversion takes seconds
    try:
        lark = any_to_lark(text)
    except RecursionError:
        raise GrammarTooComplex(f"{param} is too complex: it is too deep.", param=param) from None
    except Exception as problem:  # the converter raises whatever it meets
        raise InvalidRequest(
            f"{param} is no grammar in GBNF (with a rule root) or Lark (with a rule start): {_cut(str(problem))}.",
            param=param,
        ) from None
    rules = len(re.findall(r"(?m)^\s*[!?]?[\w.-]+[^\n:]*:", lark))
    _check_rules(rules, lark.count("|"), param)
    try:
        _check_unrolled(_unrolled_terminals(lark), param)
    except RecursionError:
        raise GrammarTooComplex(f"{param} is too complex: it is too deep.", param=param) from None
    return _checked(Body(f"body: @{OWN}\n", _with_safe_schemas(lark, param)), param)


def _check_rules(rules: int, alternatives: int, param: str) -> None:
    if rules > MAX_RULES or alternatives > MAX_ALTERNATIVES:
        raise GrammarTooComplex(
            f"{param} has {rules} rules and {alternatives} alternatives; this server takes {MAX_RULES} and "
            f"{MAX_ALTERNATIVES}.",
            param=param,
        )


def _check_unrolled(size: int, param: str) -> None:
    if size > MAX_UNROLLED:
        raise GrammarTooComplex(
            f"{param} is too complex: its repetitions have {size:,} characters, and {MAX_UNROLLED:,} are taken.",
            param=param,
        )


_DEFINITION: Final = re.compile(r"(?m)^[ \t]*[!?]?([A-Za-z_][\w.-]*)(?:\[[^\]\n]*\])?[ \t]*:")
_TOKEN: Final = re.compile(
    r'(?P<text>"(?:\\.|[^"\\\n])*")|(?P<regex>/(?:\\.|[^/\\\n])+/)|(?P<name>[A-Za-z_]\w*)|//[^\n]*'
    r"|~ *(?P<times>[\d. ]+)|.",
    re.S,
)


def _unrolled_terminals(lark: str) -> int:
    """``patterns.unrolled`` of the largest terminal, with those that it refers to. Rules cost nothing of the kind."""
    found = [*_DEFINITION.finditer(lark)]
    ends = [*(each.start() for each in found[1:]), len(lark)]
    bodies = {each[1]: lark[each.end() : end] for each, end in zip(found, ends, strict=False)}
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 1  # while it is read: what refers to itself is refused later
            sizes[name] = unrolled("".join(map(written, _TOKEN.finditer(bodies[name]))))
        return sizes[name]

    def written(token: re.Match[str]) -> str:
        """As a regular expression of the same size."""
        if token["text"]:
            return f"(.{{{len(token['text'])}}})"
        if token["regex"]:
            return f"(.{{{unrolled(token['regex'][1:-1])}}})"
        if token["name"]:
            terminal = token["name"].lstrip("_")[:1].isupper() and token["name"] in bodies
            return f"(.{{{size(token['name'])}}})" if terminal else "."
        if token["times"]:
            return f"{{{max(re.findall('[0-9]+', token['times']), key=int, default='1')}}}"
        return {"[": "(", "]": ")"}.get(token[0], token[0]) if not token[0].isspace() else ""

    terminals = [size(name) for name in bodies if name.lstrip("_")[:1].isupper()]
    inline = [unrolled(token["regex"][1:-1]) for token in _TOKEN.finditer(lark) if token["regex"]]
    return max((*terminals, *inline), default=0)


def _with_safe_schemas(lark: str, param: str) -> str:
    """Schemas inside a grammar go the way of all schemas: llguidance alone dies of some."""
    parts: list[str] = []
    end = 0
    for found in re.finditer(r"%json\s*", lark):
        if found.start() < end:
            continue
        try:
            schema, length = json.JSONDecoder().raw_decode(lark[found.end() :])
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong with it
        parts += [lark[end : found.start()], strict_rule(schema, param)]
        end = found.end() + length
    return "".join((*parts, lark[end:]))


def _checked(body: Body, param: str) -> Body:
    problem = complaint(with_sub_grammar(f"start: body\n{body.rules}", body.grammar), OWN_LIMITS)
    if problem:
        try:
            reason = said(problem)
        except TooComplex as size:
            raise GrammarTooComplex(f"{param} is too complex: {size}.", param=param) from None
        raise InvalidRequest(f"{param} cannot be used: {reason}.", param=param)
    return body


def with_sub_grammar(lark: str, own: str) -> str:
    """The grammar as the engine takes it: Lark, or llguidance's JSON where a second one belongs to it."""
    if not own:
        return lark
    return json.dumps({"grammars": [{"lark_grammar": lark}, {"name": OWN, "lark_grammar": own}]})


def _layout(given: Mapping[str, Any], param: str) -> Mapping[str, Any] | None:
    if given.get("disable_any_whitespace"):
        return {"item_separator": ",", "key_separator": ":"}
    pattern = given.get("whitespace_pattern")
    if pattern is None:
        return None
    if not isinstance(pattern, str) or not _WHITE.fullmatch(pattern):
        raise InvalidRequest(
            f"{param}.whitespace_pattern must be a regular expression of white space (got {_shown(pattern)}).",
            param=f"{param}.whitespace_pattern",
        )
    return {
        "whitespace_flexible": True,
        "whitespace_pattern": pattern,
        "item_separator": ",",
        "key_separator": ":",
    }


_WHITE: Final = re.compile(r"(?:[ \n\r\t\[\](){}|?*+]|\\[nrts]|(?<=[{,\d])[\d,](?=[\d,]*\}))*")


def _parsed(schema: Any, param: str) -> Any:
    """A schema that may come as its JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as problem:
        raise InvalidRequest(f"{param} is no JSON: {_cut(str(problem))}.", param=param) from None


def _text(given: Any, param: str) -> str:
    if not isinstance(given, str) or not given:
        raise InvalidRequest(f"{param} must be a text (got {_shown(given)}).", param=param)
    if len(given) > MAX_GRAMMAR:
        raise GrammarTooComplex(
            f"{param} has {len(given):,} characters; this server takes {MAX_GRAMMAR:,}.", param=param
        )
    if not given.isprintable() and re.search(r"[\ud800-\udfff]", given):
        raise InvalidRequest(f"{param} has half a character (a lone surrogate) in it.", param=param)
    return given


def _shown(value: Any) -> str:
    return (
        _cut(json.dumps(value, ensure_ascii=False, default=str)) if not isinstance(value, str) else f'"{_cut(value)}"'
    )


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"
