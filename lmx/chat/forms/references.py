"""What the ``$ref``s of a JSON schema name: places in the document, by address, anchor and pointer. Pure.

Called by ``lmx.chat.forms.reading``.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from lmx.chat.forms.limits import Refused
from lmx.chat.forms.shapes import Place


class References:
    def __init__(self, root: Any) -> None:
        self._root = root

    @cached_property
    def _resources(self) -> dict[str, tuple[Any, str]]:
        return dict(_resources(self._root))

    def anchors(self) -> int:
        """How many ``$dynamicAnchor``s there are."""
        return sum("$dynamicAnchor" in schema for schema, _ in self._resources.values() if isinstance(schema, dict))

    def target(self, reference: str, place: Place, keyword: str) -> Place:
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
