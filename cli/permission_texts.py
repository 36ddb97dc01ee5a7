"""The permissions of a declaration, written for a server's configuration file and for ``nsc``."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby

from .accounts import exports, imports
from .declaration import USERS_ACCOUNT, Declaration, User
from .grant import PUBLISH, SUBSCRIBE, Grant
from .permissions import grants

_WIDTH = 118
"""Characters of a line in a configuration file."""
_TAKEN = (
    *("authorization", "default_permissions", "password", "timeout", "token", "user", "users", "auth_callout"),
    *("exports", "imports", "jetstream", "limits", "maps", "mappings", "msg_trace", "nkey"),
)
"""Names that mean something in the block ``authorization``, or in that of an account."""


_VALUES = ("true", "false", "yes", "no", "on", "off")
"""Words that are no text unless they are quoted."""


def conf(declaration: Declaration) -> str:
    """The users in nats-server's configuration: the block ``authorization``, or ``accounts`` if the buckets have one.

    Passwords come from the environment.
    """
    if not declaration.jetstream_account:
        return "\n".join(["authorization {", *_users(declaration), "}"]) + "\n"
    lines = [
        "accounts {",
        *_block(
            f"{declaration.jetstream_account} {{", ["  jetstream: enabled", *_list("exports", exports(declaration))]
        ),
        *_block(f"{USERS_ACCOUNT} {{", [*_users(declaration), *_list("imports", imports(declaration))]),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _block(opening: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"  {opening}"
    yield from (f"  {line}" for line in lines)
    yield "  }"


def _list(name: str, items: Iterable[str]) -> Iterator[str]:
    yield f"  {name}: ["
    yield from (f"    {item}" for item in items)
    yield "  ]"


def _users(declaration: Declaration) -> Iterator[str]:
    for user in declaration.users.values():
        own = grants(declaration, user)
        variable = _variable(user, declaration.users)
        yield from (f"  {variable}: {{", *_allowed(PUBLISH, own), *_allowed(SUBSCRIBE, own), "  }")
    users = declaration.users
    logins = (f"{{ {_login(user)}, permissions: ${_variable(user, users)} }}" for user in users.values())
    yield from _list("users", logins)


def _variable(user: User, others: Collection[str]) -> str:
    """The name of a user's permissions in the configuration; no other user has the same."""
    name = user.name
    while name.lower() in _TAKEN or (name != user.name and name in others):
        name += "_permissions"
    return name


def _login(user: User) -> str:
    if user.nkey:
        return f"nkey: {user.nkey}"
    name = f'"{user.name}"' if user.name.lower() in _VALUES else user.name
    return f"user: {name}, password: ${user.password_variable}"


def _allowed(operation: str, own: Iterable[Grant]) -> Iterator[str]:
    chosen = [grant for grant in own if grant.operation == operation]
    if not chosen:
        yield f'    {operation}: {{ deny: ">" }}'
        return
    yield f"    {operation}: ["
    for why, group in groupby(sorted(chosen, key=lambda grant: _order(chosen, grant)), key=lambda grant: grant.why):
        subjects = [f'"{grant.subject}"' for grant in group]
        if len(subjects) == 1:
            yield f"      {subjects[0]}  # {why}"
        else:
            yield f"      # {why[0].upper()}{why[1:]}:"
            yield from _filled(subjects)
    yield "    ]"


def _order(chosen: Sequence[Grant], grant: Grant) -> int:
    """Where the first permission for the same purpose stands."""
    return next(index for index, other in enumerate(chosen) if other.why == grant.why)


def _filled(subjects: Sequence[str]) -> Iterator[str]:
    """Lines with as many subjects as have room."""
    text = ""
    for subject in subjects:
        if text and len(text) + len(subject) + 8 > _WIDTH:
            yield f"      {text}"
            text = ""
        text = f"{text}, {subject}" if text else subject
    yield f"      {text}"


def nsc(declaration: Declaration, account: str | None) -> str:
    """The commands of ``nsc`` that make users with these claims in their JWTs. ``account`` None: nsc's current one."""
    return "".join(f"{_nsc_command(declaration, user, account)}\n" for user in declaration.users.values())


def _nsc_command(declaration: Declaration, user: User, account: str | None) -> str:
    own = grants(declaration, user)
    command = ["nsc", "add", "user", "--name", user.name]
    if account is not None:
        command += ["--account", account]
    if user.nkey:
        command += ["--public-key", user.nkey]
    for operation, flag in ((PUBLISH, "pub"), (SUBSCRIBE, "sub")):
        subjects = [grant.subject for grant in own if grant.operation == operation]
        command += [f"--allow-{flag}", ",".join(subjects)] if subjects else [f"--deny-{flag}", ">"]
    return shlex.join(command)
