"""From messages and tools to the request bodies of the two OpenAI protocols. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from pydantic import BaseModel

from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import Tool

_AUTHOR = re.compile(r"[A-Za-z0-9_-]{1,64}")


def chat_body(
    messages: Sequence[ModelMessage],
    tools: Sequence[Tool],
    system_prompts: Sequence[str],
    output_schema: type[BaseModel] | None,
) -> dict[str, Any]:
    """Return what Chat Completions is asked, without the model."""
    body: dict[str, Any] = {
        "messages": [
            *({"role": "system", "content": prompt} for prompt in system_prompts),
            *map(_chat_message, messages),
        ],
        "stream_options": {"include_usage": True},
    }
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in tools
        ]
    if output_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": _output_format(output_schema),
        }
    return body


def responses_body(
    messages: Sequence[ModelMessage],
    tools: Sequence[Tool],
    system_prompts: Sequence[str],
    output_schema: type[BaseModel] | None,
) -> dict[str, Any]:
    """Return what Responses is asked, without the model; the server need not keep anything."""
    body: dict[str, Any] = {
        "input": [item for message in messages for item in _response_items(message)],
        "store": False,
    }
    if system_prompts:
        body["instructions"] = "\n\n".join(system_prompts)
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                # Strict mode would refuse optional parameters, and we check arguments anyway.
                "strict": False,
            }
            for tool in tools
        ]
    if output_schema is not None:
        body["text"] = {"format": {"type": "json_schema", **_output_format(output_schema)}}
    return body


def strict_schema(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return `schema` as strict structured output wants it, None if it cannot be said so.

    Strict means that every object is closed and lists all its properties as required. A model
    then gives a value for each optional field too.
    """
    try:
        return cast("dict[str, Any]", _close(schema))
    except ValueError:
        return None


def _close(part: Any) -> Any:
    if isinstance(part, list):
        return [_close(each) for each in cast("list[Any]", part)]
    if not isinstance(part, dict):
        return part
    fields = cast("dict[str, Any]", part)
    closed = {name: _close(value) for name, value in fields.items() if name != "default"}
    if fields.get("type") == "object":
        if "properties" not in fields or fields.get("additionalProperties") not in (None, False):
            raise ValueError("An object with free keys is not strict.")
        # A property may itself be named `default`.
        closed["properties"] = {name: _close(value) for name, value in fields["properties"].items()}
        closed["additionalProperties"] = False
        closed["required"] = list(fields["properties"])
    return closed


def _output_format(output_schema: type[BaseModel]) -> dict[str, Any]:
    schema = output_schema.model_json_schema()
    strict = strict_schema(schema)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", output_schema.__name__)[:64]
    return {"name": name, "schema": strict or schema, "strict": strict is not None}


def _chat_message(message: ModelMessage) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "tool":
        body["tool_call_id"] = message.tool_call_id or ""
        return body
    if message.name and _AUTHOR.fullmatch(message.name):
        body["name"] = message.name
    if message.tool_calls:
        # Servers differ on whether a message of calls may have empty text.
        body["content"] = message.content or None
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.args_json},
            }
            for call in message.tool_calls
        ]
    return body


def _response_items(message: ModelMessage) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [
            {
                "type": "function_call_output",
                "call_id": message.tool_call_id or "",
                "output": message.content,
            }
        ]
    items: list[dict[str, Any]] = [msgspec.json.decode(kept) for kept in message.reasoning]
    if message.content or not message.tool_calls:
        items.append({"role": message.role, "content": message.content})
    items.extend(
        {
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.args_json,
        }
        for call in message.tool_calls
    )
    return items
