"""Reading policy files: JSON, checked against ``policy.schema.json``; errors name the place and the repair."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from sparsepass.errors import SHOWN, PolicyError, close_names, shown, shown_path
from sparsepass.host.files import parse_json, read_text
from sparsepass.methods import budget_from_json
from sparsepass.policies.policy import VERSION, Policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.types import TaskClass

LARGEST = 1 << 24
"""Bytes of a policy file: enough for tens of thousands of rules."""


def load(path: Path) -> Policy:
    """The policy in a file. Raises ``PolicyError``."""
    return parse(read(path), shown_path(path))


def read(path: Path) -> str:
    """The text of a policy file. Raises ``PolicyError``."""
    return read_text(path, "policy file", PolicyError, LARGEST)


def parse(text: str, path: str) -> Policy:
    """The policy that the text of a file describes; ``path`` begins each error's text. Raises ``PolicyError``."""
    return from_json(parse_json(text, path, PolicyError), path)


def from_json(data: Any, where: str) -> Policy:
    """The policy that a file's content describes; ``where`` begins each error's text. Raises ``PolicyError``."""
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        # Before the schema: a later format would fail it in ways that hide the reason.
        raise PolicyError(
            f"{where}: at /version: the file has format version {shown(version)}, and this sparsepass reads up to "
            f"{VERSION}; upgrade sparsepass."
        )
    _validate(data, where)
    policy = Policy(
        name=data.get("name", "unnamed"),
        rules=tuple(_rule(rule, where, f"/rules/{index}") for index, rule in enumerate(data["rules"])),
        default=data.get("default", "dense"),
        description=data.get("description", ""),
        calibrated=data.get("calibrated"),
    )
    if data.get("fingerprint", policy.fingerprint) != policy.fingerprint:
        raise PolicyError(
            f"{where}: at /fingerprint: it is {data['fingerprint']}, and the content's is {policy.fingerprint}: the "
            "file was edited since it was sealed. Undo the edit, or remove the field to accept it."
        )
    return policy


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) that policy files follow."""
    text = resources.files("sparsepass.policies").joinpath("policy.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _validate(data: Any, where: str) -> None:
    try:
        import jsonschema  # here alone: everything but reading files works without it
    except ImportError as error:
        raise PolicyError(f"{where}: reading a policy file needs jsonschema; pip install jsonschema.") from error
    found = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(data))
    if found is not None:
        raise PolicyError(f"{where}: at {_pointer(found.absolute_path)}: {_explain(found)}")


def _explain(error: Any) -> str:
    """What was given and what is accepted, from jsonschema's ``ValidationError``."""
    given, accepted = error.instance, error.validator_value
    described = str(error.schema.get("description", ""))
    hint = f" {described}" if described else ""
    match error.validator:
        case "additionalProperties":
            known = error.schema["properties"]
            unknown = sorted(set(given) - set(known))[0]
            return f"unknown field {shown(unknown)}. {close_names(unknown, known)}"
        case "required":
            missing = [name for name in accepted if name not in given]
            return f"{', '.join(map(repr, missing))} is missing; given: {_listed(given)}."
        case "enum":
            return f"{shown(given)} is not accepted. {close_names(str(given), accepted)}{hint}"
        case "type":
            return f"{shown(given)} is of type {_type_name(given)}; accepted: {accepted}.{hint}"
        case "pattern":
            return f"{shown(given)} is not accepted.{hint or f' It follows the pattern {accepted}.'}"
        case _:
            return f"{shown(given)} is not accepted: {error.validator} is {shown(accepted)}.{hint}"


def _listed(names: Iterable[str]) -> str:
    some = [shown(name) for name in itertools.islice(names, 9)]
    return ", ".join(some[:8] + ["..."] * (len(some) > 8)) or "nothing"


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return names.get(type(value), "null")


def _pointer(parts: Iterable[str | int]) -> str:
    """JSON pointer (RFC 6901); ``/`` is written for the whole document, whose own pointer is the empty text."""
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts) or "/"
    return pointer if len(pointer) <= 2 * SHOWN and pointer.isprintable() else shown(pointer, 2 * SHOWN)


def _rule(data: dict[str, Any], where: str, pointer: str) -> Rule:
    lengths = data.get("lengths", {})
    part = ""
    try:
        ranges = {}
        for part in ("/layers", "/heads"):
            if part[1:] in data:
                ranges[part[1:]] = Ranges.parse(data[part[1:]])
        part = "/budget"
        budget = budget_from_json(data["budget"])
        part = ""
        return Rule(
            task=None if data["task"] == "*" else TaskClass(data["task"]),
            budget=budget,
            above=int(lengths.get("above", 0)),  # JSON Schema's integers include 1024.0
            up_to=int(lengths["up_to"]) if "up_to" in lengths else None,
            floor=data.get("floor"),
            **ranges,
        )
    except PolicyError as error:
        raise PolicyError(f"{where}: at {pointer}{part}: {error}") from error
