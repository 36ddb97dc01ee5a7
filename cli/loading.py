"""From ``my_module:factory`` to agents in a runtime.

Rules:

- An error names the module, the name, and the line of the user's own code. Frames of natsrt are not shown.
- Where a module of the user has the name of another one, the error names both files: `natsrt_cli.shadowing`.
- A callable with one parameter is called with the runtime, and may register any agents. A callable without parameters,
  or an agent class, makes one agent per call. Its first agent, with the key ``default``, is made at the start. So a
  constructor that fails is noticed then, and the class whose subscriptions and message types are registered is known.
- An agent or a team of AgentChat, as a class, from a callable without parameters, or from a JSON file, is hosted by
  `natsrt.agentchat.host`: see `natsrt_cli.chats`. A model client, as a class or from such a callable, is hosted by
  `natsrt.contrib.models.host_model`: see `natsrt_cli.model_clients`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autogen_core import AgentId, AgentInstantiationContext, BaseAgent

import natsrt
from natsrt.agents.message_types import explain_refused_types
from natsrt.agents.signatures import required_parameters
from natsrt.lifecycle import NotStarted
from natsrt.registration import register
from natsrt.runtime import NatsAgentRuntime

from .chats import component_factory, host_chats, is_chat, is_chat_class
from .exits import CommandFailed, Exit, exit_code
from .model_clients import host_client, is_model, is_model_class
from .shadowing import conflict, conflict_behind, loaded_from, refused_name

_HERE = Path(__file__).resolve().parent
_NATSRT = Path(inspect.getfile(natsrt)).resolve().parent
_DEFAULT_KEY = "default"


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded ``module:name``. ``agent_type`` is None if it takes the runtime and registers agents itself."""

    text: str
    factory: Callable[..., Any]
    agent_type: str | None
    app_dir: Path

    async def register(self, runtime: NatsAgentRuntime) -> None:
        """Register its agents.

        Raises:
            CommandFailed: The callable raised, or did not return an agent.
            RuntimeError: `needs_start` is true of it. Register again when the runtime is started.
            NatsrtError: The server or the registry cannot be reached.
        """
        if self.agent_type is None:
            result = await self._guarded(lambda: self.factory(runtime), "raised")
            if is_chat(result) or is_model(result):
                raise CommandFailed(
                    f"{self.text} takes the runtime, and returned {_called(result)}. A factory of these takes no "
                    "parameters; AgentInstantiationContext.current_runtime() is the runtime.",
                    Exit.USAGE,
                )
            return
        first, agent_type = await self._first(runtime, self.agent_type), self.agent_type
        serving = self._serving(first)
        if is_chat(first):
            await self._guarded(lambda: host_chats(runtime, agent_type, serving), "cannot be hosted")
        elif is_model(first):
            await self._guarded(lambda: host_client(runtime, agent_type, first, self.factory), "cannot be hosted")
        elif isinstance(first, BaseAgent):
            cls = type(first)
            await self._guarded(lambda: register(runtime, cls, agent_type, serving), "cannot be registered")
        elif isinstance(first, AbstractAsyncContextManager):  # which gives an agent or team of AgentChat
            await self._guarded(lambda: host_chats(runtime, agent_type, serving), "cannot be hosted")
        else:
            raise CommandFailed(
                f"{self.text} returned {type(first).__name__}, not an agent. A factory without parameters returns "
                "an autogen_core.BaseAgent, an agent or team of AgentChat, or a model client; one that registers "
                "agents takes the runtime as its only parameter.",
                Exit.USAGE,
            )

    async def _first(self, runtime: NatsAgentRuntime, agent_type: str) -> Any:
        with AgentInstantiationContext.populate_context((runtime, AgentId(agent_type, _DEFAULT_KEY))):
            return await self._guarded(self.factory, "raised")

    def _serving(self, first: Any) -> Callable[[], Any]:
        """The factory. It returns ``first`` for the default key once, since that one exists already."""
        unused = {_DEFAULT_KEY: first}

        def make() -> Any:
            return unused.pop(AgentInstantiationContext.current_agent_id().key, None) or self.factory()

        return make

    async def _guarded(self, work: Callable[[], Any], what: str) -> Any:
        try:
            result = work()
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            if exit_code(error) is Exit.NOT_CONNECTED:
                raise
            if self.agent_type is not None and needs_start(error):
                raise
            explain_refused_types(error)
            raise CommandFailed(f"{self.text} {what}: {_outline(error, self.app_dir)}") from error


def needs_start(error: BaseException) -> bool:
    """Whether a factory raised this because the runtime is not started, as one that waits for other workers does."""
    return isinstance(error, NotStarted) or isinstance(error.__cause__, NotStarted)


def load(text: str, agent_type: str | None, app_dir: Path) -> Target:
    """Import ``module:name``; both may be dotted. Modules in ``app_dir`` become importable. Or read a JSON file.

    ``agent_type`` is the type to register its agents under; None: the name, or that of the file.

    Raises:
        CommandFailed: With `Exit.USAGE`: the module or the name does not exist, importing the module fails, or the
            object is not a factory.
    """
    app_dir = app_dir.resolve()
    if text.endswith(".json"):
        _make_importable(app_dir)
        return Target(text, component_factory(Path(text)), _checked_type(agent_type or Path(text).stem), app_dir)
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        raise CommandFailed(
            f"{text!r} must be MODULE:NAME, such as my_module:factory, or a JSON file of AgentChat, such as team.json",
            Exit.USAGE,
        )
    if module_name.endswith(".py") or "/" in module_name:
        meant = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise CommandFailed(f"{module_name!r} must be the name of a module, not a path: {meant}:{name}", Exit.USAGE)
    _make_importable(app_dir)
    module = _module(module_name, app_dir)
    try:
        found = _attribute(module, module_name, name)
        hosted = _type_of(found, text, agent_type or name.rpartition(".")[2], agent_type)
    except CommandFailed as error:
        raise CommandFailed(f"{error}{_not_from(app_dir, module_name)}", error.code) from None
    return Target(text, found, hosted, app_dir)


def _make_importable(app_dir: Path) -> None:
    if sys.path[:1] != [str(app_dir)]:
        sys.path.insert(0, str(app_dir))


def _not_from(app_dir: Path, module_name: str) -> str:
    """For errors about a module's contents: its file, if it is not in ``app_dir``, where the user may expect it."""
    file = loaded_from(module_name, app_dir)
    if file is None:
        return ""
    advice = f"it is not in {app_dir}; use --app-dir for another directory"
    return f"\n  {conflict(module_name, app_dir) or f'{module_name!r} was loaded from {file}: {advice}'}"


def _module(name: str, app_dir: Path) -> Any:
    if (refused := refused_name(name, app_dir)) is not None:
        raise CommandFailed(f"the module {name!r} cannot be used: {refused}", Exit.USAGE)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            above = error.name.rpartition(".")[0]
            if above in sys.modules:
                raise CommandFailed(
                    f"there is no module {error.name!r}{_not_from(app_dir, above)}", Exit.USAGE
                ) from None
            missing = f"there is no module {error.name!r} in {app_dir} or among the installed packages"
            raise CommandFailed(f"{missing}; use --app-dir for another directory", Exit.USAGE) from None
        raise CommandFailed(
            f"the module {name!r} cannot be imported: {_outline(error, app_dir)}", Exit.USAGE
        ) from error


def _attribute(module: Any, module_name: str, name: str) -> Any:
    found, where = module, module_name
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [other for other in vars(found) if not other.startswith("_")] if hasattr(found, "__dict__") else []
            near = difflib.get_close_matches(part, public, 3) or [
                other for other in public if getattr(getattr(found, other), "__module__", None) == module_name
            ]
            hint = f"; it has {', '.join(near[:10])}" if near else ""
            raise CommandFailed(f"{where!r} has no name {part!r}{hint}", Exit.USAGE) from None
        where = f"{where}.{part}"
    return found


def _type_of(found: Any, text: str, name: str, agent_type: str | None) -> str | None:
    """The agent type to register ``found`` under; None if ``found`` takes the runtime."""
    if is_chat(found) or is_model(found):
        whose = "worker process" if is_model(found) else "session"
        raise CommandFailed(
            f"{text} is {_called(found)} itself, but each {whose} needs one of its own: name a function that makes it, "
            f"such as `def {name}(): return {type(found).__name__}(…)`",
            Exit.USAGE,
        )
    if not callable(found):
        raise CommandFailed(f"{text} is {type(found).__name__}, not a factory or agent class", Exit.USAGE)
    is_class = inspect.isclass(found)
    if is_class and not (issubclass(found, BaseAgent) or is_chat_class(found) or is_model_class(found)):
        raise CommandFailed(
            f"{text} is a class, but not one of agents, of agents or teams of AgentChat, or of model clients",
            Exit.USAGE,
        )
    required = _required(found, text)
    if is_class and required:
        raise CommandFailed(
            f"the agent class {text} needs arguments ({', '.join(required)}): name a function that makes it, "
            f"such as `def factory(): return {found.__name__}(…)`",
            Exit.USAGE,
        )
    first = next(iter(inspect.signature(found).parameters), None)
    takes_runtime = not is_class and (len(required) == 1 or (not required and first == "runtime"))
    if len(required) > 1:
        raise CommandFailed(
            f"{text} takes {len(required)} arguments ({', '.join(required)}): a factory takes the runtime, or nothing",
            Exit.USAGE,
        )
    if takes_runtime and agent_type is not None:
        raise CommandFailed(
            f"--type cannot be used with {text}: it takes the runtime and names its agent types itself", Exit.USAGE
        )
    if takes_runtime:
        return None
    return _checked_type(name)


def _checked_type(name: str) -> str:
    try:
        return AgentId(name, _DEFAULT_KEY).type
    except ValueError:
        raise CommandFailed(f"{name!r} is not a valid agent type: choose one with --type", Exit.USAGE) from None


def _called(found: Any) -> str:
    name = getattr(found, "name", None)
    return f"the {type(found).__name__}{f' {name!r}' if isinstance(name, str) else ''}"


def _required(found: Callable[..., Any], text: str) -> list[str]:
    """The names of the parameters without a default."""
    try:
        needed = required_parameters(found)
    except (TypeError, ValueError):
        raise CommandFailed(
            f"the parameters of {text} cannot be read; name a plain function instead", Exit.USAGE
        ) from None
    named = [parameter.name for parameter in needed if parameter.kind is parameter.KEYWORD_ONLY]
    if named and not inspect.isclass(found):
        raise CommandFailed(f"{text} needs the keyword {named[0]}: a factory takes the runtime, or nothing", Exit.USAGE)
    return [parameter.name for parameter in needed]


def _outline(error: BaseException, app_dir: Path) -> str:
    """Class and text of ``error``, the last line of the user's own code in its traceback, and what may be behind it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    behind = conflict_behind(error, app_dir)
    because = f"\n  {behind}" if behind else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    own = [f for f in frames if Path(f.filename).is_relative_to(app_dir) and "site-packages" not in f.filename]
    if not (own or frames):
        return f"{text}{because}"
    frame = (own or frames)[-1]
    code = f"\n    {frame.line}" if frame.line else ""
    return f"{text}\n  {frame.filename}, line {frame.lineno}, in {frame.name}{code}{because}"


def _is_users(filename: str) -> bool:
    path = Path(filename)
    is_library = path.is_relative_to(_NATSRT) or path.is_relative_to(_HERE) or path == Path(importlib.__file__)
    return not is_library and not filename.startswith("<")
