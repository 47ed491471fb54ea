"""YAML as it was meant: PyYAML takes the last of two equal keys, and what nests too deeply kills the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import yaml

_MAX_DEPTH = 64
_MERGE = "tag:yaml.org,2002:merge"
_TOLD = 5


def load(data: bytes) -> Any:
    """The one document of a file; None if it is empty. Raises ValueError that says where it is wrong."""
    import yaml  # noqa: PLC0415 - most servers run without a file

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = kind(data)
    try:
        _check_depth(yaml.parse(data, kind))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, AttributeError, OverflowError) as error:  # the latter two for a wrong tag at a scalar
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        loader.dispose()


def _check_depth(events: Iterable[yaml.Event]) -> None:
    """Of what the C parser reads without recursion, before it is composed with it."""
    import yaml  # noqa: PLC0415 - as above

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {_line(event.start_mark)} nests deeper than {_MAX_DEPTH}")


def _check_keys(root: yaml.Node) -> None:
    twice = list(_repeated(root))
    if twice:
        more = f" and {len(twice) - _TOLD} more" if len(twice) > _TOLD else ""
        raise ValueError(f"{'; '.join(twice[:_TOLD])}{more}")


def _repeated(root: yaml.Node) -> Iterator[str]:
    """Keys that a mapping has twice, each node once however many aliases it has."""
    import yaml  # noqa: PLC0415 - as above

    nodes, seen = [root], {id(root)}
    while nodes:
        node = nodes.pop()
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            yield from _repeated_in(node)
        new = {id(part): part for part in parts if id(part) not in seen}
        seen.update(new)
        nodes += new.values()


def _repeated_in(mapping: yaml.MappingNode) -> Iterator[str]:
    known: set[tuple[str, str]] = set()
    for key, _ in mapping.value:
        if isinstance(key.value, str) and key.tag != _MERGE:
            if (key.tag, key.value) in known:
                yield f"line {_line(key.start_mark)} has the key {key.value} a second time"
            known.add((key.tag, key.value))


def _line(mark: Any) -> int:
    return int(mark.line) + 1
