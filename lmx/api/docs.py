"""GET /docs: what /openapi.json says, as a page that needs neither the internet nor JavaScript."""

from typing import Any

from quart import Blueprint, current_app, render_template_string
from quart_schema import hide

PAGE = """<!doctype html>
<meta charset="utf-8"><title>{{ info.title }} {{ info.version }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
  code { font-size: 14px } td { padding: .1rem 1rem .1rem 0; vertical-align: top } summary { cursor: pointer }
</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }} Machine-readable: <a href="/openapi.json">/openapi.json</a>.</p>
{% for method, path, operation, fields in operations %}
<h3><code>{{ method }} {{ path }}</code></h3>
<p>{{ operation.summary }} {{ operation.description }}</p>
{% if fields %}<details><summary>Request fields</summary><table>
{% for name, type, about in fields %}<tr><td><code>{{ name }}</code><td>{{ type }}<td>{{ about }}</tr>
{% endfor %}</table></details>{% endif %}
{% endfor %}
"""


def blueprint() -> Blueprint:
    """The docs page."""
    routes = Blueprint("docs", __name__)

    @routes.get("/docs")
    @hide
    async def docs() -> str:
        schema = current_app.extensions["QUART_SCHEMA"].openapi_provider.schema()
        operations = [
            (method.upper(), path, operation, _fields(operation))
            for path, methods in sorted(schema["paths"].items())
            for method, operation in methods.items()
            if method != "head"
        ]
        return await render_template_string(PAGE, info=schema["info"], operations=operations)

    return routes


def _fields(operation: dict[str, Any]) -> list[tuple[str, str, str]]:
    content = operation.get("requestBody", {}).get("content", {})
    properties = content.get("application/json", {}).get("schema", {}).get("properties", {})
    return [(name, _type(field), field.get("description", "")) for name, field in properties.items()]


def _type(field: dict[str, Any]) -> str:
    members = field.get("anyOf", [field])
    names = [member.get("type", member.get("$ref", "any").rpartition("/")[2]) for member in members]
    return " or ".join(name for name in names if name != "null")
