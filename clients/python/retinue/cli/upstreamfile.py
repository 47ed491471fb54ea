"""Files of upstreams, as the server reads them: `upstreams:` and a list of `retinue.ambassador.v1.Upstream`.

Names of enums may go without their prefix: `protocol: TCP`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format

from retinue.ambassador.v1 import upstream_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.descriptor import Descriptor, EnumDescriptor


def parse(text: str, name: str) -> Sequence[pb.Upstream]:
    """The upstreams of a file's text; raises a usage error with the first that is none."""
    import yaml  # noqa: PLC0415 - no other command reads YAML

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise click.UsageError(f"{name} is no YAML: {error}") from None
    entries = values.get("upstreams") if isinstance(values, dict) and set(values) == {"upstreams"} else None
    if not isinstance(entries, list):
        raise click.UsageError(f"{name} must be a mapping with the one key `upstreams`, a list")
    return [_upstream(entry, f"{name}: upstreams[{index}]") for index, entry in enumerate(entries)]


def _upstream(entry: Any, at: str) -> pb.Upstream:
    try:
        return json_format.ParseDict(_spelt_out(entry, pb.Upstream.DESCRIPTOR), pb.Upstream())
    except json_format.ParseError as error:
        raise click.UsageError(f"{at}: {error}") from None


def _spelt_out(value: Any, message: Descriptor) -> Any:
    """With the prefixes of enums that were left out; and with the field `on`, which YAML takes for `true`."""
    if isinstance(value, list):
        return [_spelt_out(one, message) for one in value]
    if not isinstance(value, dict):
        return value
    fields = message.fields_by_name
    named = {"on" if key is True else key: one for key, one in value.items()}
    return {key: _field(one, fields[key]) if key in fields else one for key, one in named.items()}


def _field(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return _spelt_out(value, field.message_type)
    if field.enum_type is None:
        return value
    if isinstance(value, list):
        return [_named(one, field.enum_type) for one in value]
    return _named(value, field.enum_type)


def _named(value: Any, enum: EnumDescriptor) -> Any:
    full = f"{enum.values[0].name.removesuffix('UNSPECIFIED')}{value}"
    return full if full in enum.values_by_name else value
