"""`GET /docs`: the OpenAPI document as one page without scripts or anything else to fetch.

So it works without the internet, behind any prefix that a proxy takes away, and with nothing that a browser could be made
to send. Its one link is relative.
"""

import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1f2328; }
h2 { margin-top: 2.5rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
code, pre { font: 14px/1.45 ui-monospace, monospace; background: #f6f8fa; border-radius: 4px; }
code { padding: 0 .25rem; } pre { padding: .75rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .75rem
.25rem 0; border-bottom: 1px solid #d0d7de; }
"""


def render(document: dict[str, Any]) -> str:
    """The page of an OpenAPI document of ours."""
    info = document["info"]
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    paragraphs = "".join(f"<p>{_text(part)}</p>" for part in info["description"].strip().split("\n\n"))
    title = escape(info["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{paragraphs}"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>. <code>$TEACHER</code> below is the address of '
        f"this server.</p>{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    key = "needs the key, where the server has one" if "security" in operation else "needs no key"
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}</h2>"]
    parts.append(f"<p>{_text(operation.get('description', ''))} It {key}.</p>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    header = ' -H "Authorization: Bearer $KEY"' if "security" in operation else ""
    if not body:
        parts.append(f"<pre>{escape(f'curl -s $TEACHER{path}{header}')}</pre>")
    else:
        parts.append(f"<p>The body is a {_type(body['schema'])}.</p>")
    for example in body.get("examples", {}).values():
        lines = f"curl -s $TEACHER{path}{header} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example['value'])}'"
        parts.append(f"<p>{escape(example['summary'])}:</p><pre>{escape(lines)}</pre>")
    rows = [_answer(status, answer) for status, answer in operation["responses"].items()]
    return "".join(parts) + _table(("answer", "", ""), rows)


def _answer(status: str, answer: dict[str, Any]) -> tuple[str, str, str]:
    kinds = [f"{escape(media)}: {_type(content['schema'])}" for media, content in answer.get("content", {}).items()]
    return escape(status), escape(answer["description"]), "<br>".join(kinds)


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for field, what in schema.get("properties", {}).items():
        default = f" Default: <code>{escape(json.dumps(what['default']))}</code>." if "default" in what else ""
        needed = "required" if field in required else ""
        rows.append(
            (f"<code>{escape(field)}</code>", _type(what), f"{_text(what.get('description', ''))}{default} {needed}")
        )
    return f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>' + _table(
        ("field", "type", ""), rows
    )


def _type(schema: dict[str, Any]) -> str:
    """In words, with links to the schemas of the page."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if options := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(map(_type, options))
    if "enum" in schema or "const" in schema:
        return " or ".join(
            f"<code>{escape(json.dumps(value))}</code>" for value in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = ((">=", "minimum"), ("<=", "maximum"), (">", "exclusiveMinimum"), ("<", "exclusiveMaximum"))
    bounds = "".join(f" {escape(sign)} {schema[name]}" for sign, name in limits if name in schema)
    return f"{escape(schema.get('type', 'anything'))}{bounds}"


def _text(text: str) -> str:
    """A docstring: `code` between backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _table(head: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(f"<th>{word}</th>" for word in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"
