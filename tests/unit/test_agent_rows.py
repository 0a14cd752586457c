"""The structs that agents write are the contracts, byte for byte."""

from datetime import UTC, datetime

import pytest
from pydantic import BaseModel

from aidb_ray.agents.rows import (
    GenerationRow,
    MessageRow,
    ToolCallRow,
    UsageRow,
    decode_call,
    decode_generation,
    decode_message,
    encode_row,
)
from aidb_ray.contracts import AgentMessage, Generation, ToolCall, Usage, time_text

NOW = time_text(datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC))
ROWS: list[tuple[GenerationRow | ToolCallRow | MessageRow, type[BaseModel]]] = [
    (GenerationRow("g", "writer", created_at=NOW, updated_at=NOW), Generation),
    (
        GenerationRow(
            "g",
            "writer",
            "failed",
            ["m1", "m2"],
            ["first"],
            2,
            1,
            UsageRow(3, 4, 7),
            "It broke.",
            "model_error",
            NOW,
            NOW,
        ),
        Generation,
    ),
    (ToolCallRow("g:0:0", "g", "search", created_at=NOW, updated_at=NOW), ToolCall),
    (
        ToolCallRow(
            "g:0:1",
            "g",
            "search",
            {"query": "salt", "limit": 5},
            "completed",
            "writer",
            0,
            "call-1",
            1,
            ["a", 1, None],
            created_at=NOW,
            updated_at=NOW,
        ),
        ToolCall,
    ),
    (MessageRow("m", "user", "someone", created_at=NOW), AgentMessage),
    (
        MessageRow(
            "g:reply",
            "assistant",
            "writer",
            "someone",
            'Ünïcode \u2028 "quoted"',
            NOW,
            processed=True,
            generation_id="g",
            in_reply_to="m",
        ),
        AgentMessage,
    ),
]


@pytest.mark.parametrize(("row", "contract"), ROWS)
def test_a_struct_is_stored_as_its_contract_would_be(
    row: GenerationRow | ToolCallRow | MessageRow, contract: type[BaseModel]
) -> None:
    encoded = encode_row(row)

    model = contract.model_validate_json(encoded)

    assert model.model_dump_json(by_alias=True).encode() == encoded


@pytest.mark.parametrize(("row", "contract"), ROWS)
def test_a_stored_contract_is_read_as_the_struct(
    row: GenerationRow | ToolCallRow | MessageRow, contract: type[BaseModel]
) -> None:
    stored = contract.model_validate_json(encode_row(row)).model_dump_json(by_alias=True).encode()

    decode = {
        GenerationRow: decode_generation,
        ToolCallRow: decode_call,
        MessageRow: decode_message,
    }

    assert decode[type(row)](stored) == row


@pytest.mark.parametrize(
    ("struct", "contract"),
    [
        (GenerationRow, Generation),
        (ToolCallRow, ToolCall),
        (MessageRow, AgentMessage),
        (UsageRow, Usage),
    ],
)
def test_a_struct_has_the_fields_of_its_contract_in_their_order(
    struct: type[GenerationRow | ToolCallRow | MessageRow | UsageRow], contract: type[BaseModel]
) -> None:
    assert list(struct.__struct_fields__) == list(contract.model_fields)
