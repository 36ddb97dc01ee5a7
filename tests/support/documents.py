"""What tests read out of the documents, and the parts of documents that are generated.

``python -m tests.support.documents`` writes the generated parts anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from natsrt_cli.auth import read
from natsrt_cli.declaration import parse
from natsrt_cli.exits import MEANINGS
from natsrt_cli.permission_texts import conf
from pydantic import SecretStr

from natsrt.options import Options, describe_options
from natsrt.options.values import kind_of
from tests.support.processes import REPOSITORY

_FENCE = re.compile(r"^( *)```(\w*)(?: ([^\n]*))?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    path: Path
    line: int
    language: str
    remark: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line}"


def documents() -> list[Path]:
    return sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def blocks(*languages: str) -> list[Block]:
    return [block for path in documents() for block in _blocks(path) if block.language in languages]


def _blocks(path: Path) -> Iterator[Block]:
    text = path.read_text("utf-8")
    for found in _FENCE.finditer(text):
        indent, language, remark, inner = found.groups()
        dedented = "\n".join(line.removeprefix(indent) for line in inner.splitlines()) + "\n"
        yield Block(path, text.count("\n", 0, found.start()) + 1, language, remark or "", dedented)


def settings_table() -> str:
    lines = ["| setting | environment | value | default | meaning |", "|---|---|---|---|---|"]
    for row in describe_options():
        variables = f"`{row.env}`" + (f", `{row.nats_env}`" if row.nats_env else "")
        default = f"`{row.default}`" if row.default else "empty"
        lines.append(f"| `{row.field}` | {variables} | {row.type} | {default} | {row.description} |")
    return "\n".join(lines) + "\n"


def exit_codes_table() -> str:
    lines = ["| code | name | meaning |", "|---|---|---|"]
    lines += [f"| {code.value} | {code.name.lower()} | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join(lines) + "\n"


OWN_PARAMETERS = ("servers", "name", "namespace")
"""The settings that `NatsAgentRuntime` has as its own parameters. A type checker refuses a name that is there twice."""

_ARGUMENTS = {
    tuple: "str | Sequence[str]",
    Mapping: "str | Sequence[str] | Mapping[str, bool | KeyedOptions | Mapping[str, Any]]",
    dict: "str | Mapping[str, Mapping[str, Any]]",
    Sequence: "str | DurableTopics | Mapping[str, Any] | Sequence[str | DurableTopics | Mapping[str, Any]]",
    str: "str",
    SecretStr: "str | SecretStr",
    Path: "str | PathLike[str]",
    float: "float",
    int: "int",
    bool: "bool",
}
"""What a caller may give for a setting of a type."""


def settings_classes() -> str:
    """`natsrt.options.arguments`: the settings as keyword arguments."""
    more, own = [], []
    for field, info in Options.model_fields.items():
        kind, optional = kind_of(info)
        none_word = ' | Literal["none"]' if optional and kind is float else ""
        line = f"    {field}: {_ARGUMENTS[kind]}{none_word} | None"
        (own if field in OWN_PARAMETERS else more).append(line)
    return "\n".join(
        [
            "class MoreSettings(TypedDict, total=False):",
            '    """The settings that are not parameters of `natsrt.NatsAgentRuntime` by themselves."""',
            "",
            *more,
            "",
            "",
            "class Settings(MoreSettings, total=False):",
            '    """All settings."""',
            "",
            *own,
            "",
            "",
            "",
        ]
    )


def permissions_block() -> str:
    """The permissions of the four users that the documents know, as ``natsrt auth conf`` prints them."""
    return f"```conf\n{conf(read(None))}```\n"


def permissions_comment() -> str:
    """The same in `nats.conf`, where it is a comment."""
    return "".join(f"# {line}\n" for line in conf(read(None)).splitlines())


def accounts_declaration() -> str:
    """The declaration on the page about accounts."""
    (found,) = (block.text for block in blocks("toml") if block.path.name == "accounts.md")
    return found


def accounts_block() -> str:
    """The accounts that ``natsrt auth conf`` makes of it."""
    return f"```conf\n{conf(parse(accounts_declaration(), 'docs/accounts.md'))}```\n"


GENERATED: dict[str, tuple[str, Callable[[], str]]] = {
    "docs/configuration.md": ("settings", settings_table),
    "docs/cli.md": ("exit codes", exit_codes_table),
    "docs/permissions.md": ("permissions", permissions_block),
    "docs/accounts.md": ("accounts", accounts_block),
    "natsrt/options/arguments.py": ("settings", settings_classes),
    "nats.conf": ("permissions", permissions_comment),
}
"""Files with a generated part: its name in the marks around it, and what it says."""


def with_generated_part(name: str) -> str:
    """The text of a file with its generated part as the code has it."""
    part, make = GENERATED[name]
    text = (REPOSITORY / name).read_text("utf-8")
    marks = re.compile(rf"(<!-- {part}: [^>]*-->\n).*?((?:# )?<!-- end of {part} -->)", re.DOTALL)
    written, count = marks.subn(lambda found: found[1] + make() + found[2], text)
    assert count == 1, f"{name} has no place for its {part}"
    return written


if __name__ == "__main__":
    for name in GENERATED:
        (REPOSITORY / name).write_text(with_generated_part(name), "utf-8")
