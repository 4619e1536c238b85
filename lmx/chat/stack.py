"""Room for llguidance's recursion. It goes down a grammar's rules, and a schema's references, one frame of the stack
for each: the usual 8 MB end at some 900 references one behind the other (70 kB of JSON), and with them the process.

Pure. Called by whoever gives llguidance a client's grammar: ``lmx.chat`` in the server, ``lmx.engine.grammar``.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

MOST_CHARACTERS = 1 << 20
"""Of a grammar that fits: rules of 10 characters, one behind the other, take 4 kB of stack each, references 10 kB."""
FLAT_CHARACTERS = 1 << 13
"""Of a grammar that goes nowhere deeper than the usual stack reaches."""
MOST_LINES = 20_000
"""Mostly a rule each; 200 tools need some 5,000. Terminals that refer to the next take a second where there are 4,000,
and more than a minute where there are 8,000: ``lmx.chat.forms.structured`` takes 500 rules of a client's grammar."""
# Address space: a thread uses what it touches, and gives that back when it ends.
_STACK_BYTES = 1 << 30
_Result = TypeVar("_Result")
_starting = threading.Lock()


def too_large(grammar: str) -> str:
    """Why llguidance should not be asked to compile it; empty: it may be."""
    if len(grammar) > MOST_CHARACTERS:
        return f"it has {len(grammar):,} characters, and {MOST_CHARACTERS:,} can be compiled"
    lines = grammar.count("\n") + 1
    return f"it has {lines:,} lines, and {MOST_LINES:,} can be compiled" if lines > MOST_LINES else ""


def on_a_large_stack(work: Callable[[], _Result]) -> _Result:
    """``work()``, in a thread of its own. Blocks. Raises what it raises."""
    result: Future[_Result] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="large stack")
    with _starting:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return result.result()
