"""Data contracts (Open Data Contract Standard 3.1): the only place where tables and columns are named.

Every table of svbatch's own has one, `<table>.odcs.yaml`; the contract of a user's task is made from the columns of
its answer type, `answers.yaml`. They lie in the folder `schemas/` of the source tree and are installed as the package
`svbatch.schemas`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib import resources, util
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

Contract = Mapping[str, Any]
KEY = ["uri", "channel", "start"]


@cache
def table_names() -> frozenset[str]:
    """The tables that have a contract of their own."""
    suffix = ".odcs.yaml"
    return frozenset(f.name.removesuffix(suffix) for f in _folder().iterdir() if f.name.endswith(suffix))


@cache
def read_contract(table: str) -> Contract:
    """The contract of one of `table_names`."""
    contract: Contract = yaml.safe_load((_folder() / f"{table}.odcs.yaml").read_text(encoding="utf-8"))
    return contract


def answer_contract(
    table: str,
    purpose: str,
    columns: str,
    *,
    carried: Sequence[tuple[str, str]] = (),
    whole: bool = False,
    properties: Sequence[Mapping[str, Any]] = (),
) -> Contract:
    """The contract of a task's table. columns: a key of `answers.yaml`. carried: name and description of text columns
    before these. whole: its numbers are whole ones. properties: of the object that an answer is, as ODCS properties."""
    known = _answers()
    own = deepcopy(known[columns])
    if whole:
        own[0] |= {"logicalType": "integer", "physicalType": "bigint"}
    if properties:
        own[0]["properties"] = list(properties)
    text = {"logicalType": "string", "physicalType": "varchar", "required": True}
    own = [*({"name": name, **text, "description": said} for name, said in carried), *own]
    return {
        "apiVersion": "v3.1.0",
        "kind": "DataContract",
        "id": f"svbatch-{table.replace('_', '-')}",
        "name": table,
        "version": "1.0.0",
        "status": "active",
        "description": {"purpose": purpose},
        "servers": [{"server": "output", "type": "local", "path": f"out/{table}/*.parquet", "format": "parquet"}],
        "schema": [
            {
                "name": table,
                "logicalType": "object",
                "description": "One row per span of a recording that was asked.",
                "quality": [
                    {
                        "metric": "duplicateValues",
                        "arguments": {"properties": KEY},
                        "mustBe": 0,
                        "description": "The key of the table.",
                    }
                ],
                "properties": [*known["common"]["before"], *own, *known["common"]["after"]],
            }
        ],
    }


@cache
def _answers() -> dict[str, Any]:
    answers: dict[str, Any] = yaml.safe_load((_folder() / "answers.yaml").read_text(encoding="utf-8"))
    return answers


def _folder() -> Traversable:
    if util.find_spec("svbatch.schemas"):
        return resources.files("svbatch.schemas")
    return Path(__file__).parents[2] / "schemas"
