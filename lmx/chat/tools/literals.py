"""Values as models write them inside calls, read in pieces and given on as JSON text.

Two dialects: JSON, whose text passes through as it is, and Python's literals, which are rewritten. Both are checked, so
that what is given on is JSON; only control characters inside strings, which models write raw, are repaired. A value
ends by its own rules, whatever its strings hold. Pure; the readers of this package call it.
"""

import ast
import json
import re
from collections.abc import Callable

from lmx.chat.tools.source import Broken, Source, Steps

Out = Callable[[str], object]

SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_PLAIN_PYTHON = re.compile(r"[^\"'\\\x00-\x1f]+")
_WORD = re.compile(r"[-+.\w]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_CLOSERS = {"[": "]", "{": "}"}
_WORDS = {word: word for word in ("true", "false", "null")}
_PYTHON_WORDS = _WORDS | {"True": "true", "False": "false", "None": "null"}
_PYTHON_ESCAPES = {"\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_PYTHON_DIGITS = {"x": 2, "u": 4, "U": 8}
_NESTED_TUPLES = 20


def space(source: Source) -> Steps[str]:
    """Read white space, as much as comes."""
    return source.run(SPACE)


def value(source: Source, out: Out, *, python: bool = False) -> Steps[None]:
    """Read one value. Raises Broken; what was given on by then is the beginning of one."""
    return _value(source, out, python, 0)


def text(source: Source, *, python: bool = False) -> Steps[str]:
    """Read one string: what it says."""
    parts: list[str] = []
    yield from (_python_string if python else _string)(source, parts.append)
    return str(json.loads("".join(parts)))


def _value(source: Source, out: Out, python: bool, tuples: int) -> Steps[None]:
    closers: list[str] = []  # and no recursion: models nest without end
    quotes = "\"'" if python else '"'
    string = _python_string if python else _string

    def key() -> Steps[None]:
        if (yield from source.peek()) not in quotes:
            raise Broken("a key is no string")
        yield from string(source, out)
        out((yield from space(source)))
        yield from source.expect(":")
        out(":")
        out((yield from space(source)))

    while True:
        character = yield from source.peek()
        if character in _CLOSERS:
            source.at += 1
            closers.append(_CLOSERS[character])
            out(character)
            out((yield from space(source)))
            if (yield from source.peek()) != closers[-1]:
                if character == "{":
                    yield from key()
                continue
            source.at += 1
            out(closers.pop())
        elif character in quotes:
            yield from string(source, out)
        elif python and character == "(":
            yield from _tuple(source, out, tuples)
        else:
            out(_word((yield from source.run(_WORD)), python))
        while closers:
            blank = yield from space(source)
            character = yield from source.peek()
            if character == ",":
                source.at += 1
                after = yield from space(source)
                character = yield from source.peek()
                if not (python and character == closers[-1]):
                    out(blank + "," + after)
                    if closers[-1] == "}":
                        yield from key()
                    break
            if character != closers[-1]:
                raise Broken(f"{character!r} stands where ',' or {closers[-1]!r} is expected")
            source.at += 1
            out(blank + closers.pop())
        else:
            return


def _tuple(source: Source, out: Out, tuples: int) -> Steps[None]:
    """A tuple as a list, or what stands in brackets: which one is known at its end."""
    if tuples == _NESTED_TUPLES:
        raise Broken("tuples are nested too deep")
    source.at += 1
    parts: list[str] = []
    count = commas = 0
    while True:
        yield from space(source)
        if (yield from source.peek()) == ")":
            break
        if count > commas:
            yield from source.expect(",")
            commas += 1
        else:
            parts.append(", " if count else "")
            yield from _value(source, parts.append, True, tuples + 1)
            count += 1
    source.at += 1
    joined = "".join(parts)
    out(joined if count == 1 and not commas else f"[{joined}]")


def _word(word: str, python: bool) -> str:
    words = _PYTHON_WORDS if python else _WORDS
    if word in words:
        return words[word]
    if _NUMBER.fullmatch(word):
        return word
    if python:
        try:  # 0x10, 1_000, .5
            return json.dumps(_number(ast.literal_eval(word)), allow_nan=False)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    raise Broken(f"{word[:40]!r} is no value")


def _number(literal: object) -> int | float:
    if isinstance(literal, int | float):
        return literal
    raise ValueError


def _string(source: Source, out: Out) -> Steps[None]:
    yield from source.expect('"')
    out('"')
    while True:
        plain = _PLAIN.match(source.text, source.at)
        if plain:
            source.at = plain.end()
            out(plain[0])
        character = yield from source.peek()
        if character == '"':
            source.at += 1
            out('"')
            return
        if character == "\\":
            source.at += 1
            escape = yield from source.peek()
            if escape not in '"\\/bfnrtu':
                raise Broken(f"\\{escape} is no escape of JSON's")
            source.at += 1
            out("\\" + escape + ((yield from _hexadecimal(source, 4)) if escape == "u" else ""))
        elif character < " ":
            source.at += 1
            out(_escaped(character))


def _python_string(source: Source, out: Out) -> Steps[None]:
    quote = yield from source.peek()
    source.at += 1
    out('"')
    if (yield from source.accept(quote)):
        if not (yield from source.accept(quote)):
            out('"')
            return
        quote *= 3
    while True:
        plain = _PLAIN_PYTHON.match(source.text, source.at)
        if plain:
            source.at = plain.end()
            out(plain[0])
        character = yield from source.peek()
        if (yield from source.accept(quote)):
            out('"')
            return
        if character == "\\":
            source.at += 1
            yield from _python_escape(source, out)
        elif character in "\"'" or character < " ":
            source.at += 1
            out(_escaped(character))


def _python_escape(source: Source, out: Out) -> Steps[None]:
    escape = yield from source.peek()
    source.at += 1
    if escape in _PYTHON_ESCAPES:
        out("".join(map(_escaped, _PYTHON_ESCAPES[escape])))
    elif escape in _PYTHON_DIGITS:
        code = int((yield from _hexadecimal(source, _PYTHON_DIGITS[escape])), 16)
        if code > 0x10FFFF:
            raise Broken(f"{code:#x} is no character")
        out(_escaped(chr(code)))
    elif "0" <= escape <= "7":
        digits = escape
        while len(digits) < 3 and "0" <= (yield from source.peek()) <= "7":
            digits += source.text[source.at]
            source.at += 1
        out(_escaped(chr(int(digits, 8))))
    else:
        out(_escaped(escape) if escape in "\\'\"" else "\\\\" + _escaped(escape))


def _hexadecimal(source: Source, count: int) -> Steps[str]:
    digits = ""
    for _ in range(count):
        digit = yield from source.peek()
        if digit not in "0123456789abcdefABCDEF":
            raise Broken(f"{digit!r} is no hexadecimal digit")
        source.at += 1
        digits += digit
    return digits


def _escaped(character: str) -> str:
    """A character as it stands in JSON's strings."""
    special = character in '"\\' or character < " " or "\ud800" <= character <= "\udfff"
    return json.dumps(character)[1:-1] if special else character
