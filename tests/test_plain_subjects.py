"""Subjects of plain messages and services: which ones declarations of permissions, services and runtimes take."""

from __future__ import annotations

import pytest
from natsrt_cli.declaration import parse

from natsrt import NatsAgentRuntime
from natsrt.errors import ConfigurationError
from natsrt.options import Options
from natsrt.plain import PlainMessage, checked_service_subject

NATSRTS = ["ns.agent.x", "ns.agent", "ns.topic.>", "ns.natsrt.view", "ns.*", "ns.>", "*.agent.x"]
"""Subjects of natsrt in the namespace ns, or patterns that include some."""
OTHERS = ["agent.a", "topic.>", "natsrt.control.x", "agent"]
"""Subjects of natsrt without a namespace."""
INBOXES = ["_INBOX", "_INBOX.>", "_INBOX.a", "_INBOX_own.>", "_INBOX_own", "_INBOX_own.*", "*.get", "*", ">", "*.>"]
"""Inboxes, and patterns that include some. Those that begin with a wildcard include natsrt's subjects, too."""
SERVERS = ["$JS.API.>", "$SYS.>", "$SRV.PING", "$KV.natsrt.>"]
MALFORMED = ["a b", "", "a..b", ".a", "a.", "a.>.b", "a*"]
FREE = ["a", "ns.weather.get", "ns.agents", "ns.agents.>", "a.>", "weather.*.get", "_INBOXES.a", "agents"]


def declare(key: str, subject: str, more: str = "") -> str:
    user = f'[users.a]\nrole = "client"\ninbox_prefix = "_INBOX_own"\n{key} = ["{subject}"]\n'
    return f'namespace = "ns"\n{user}{more}'


@pytest.mark.parametrize("subject", NATSRTS + INBOXES + SERVERS + MALFORMED)
@pytest.mark.parametrize("key", ["requests", "offers"])
def test_a_declaration_has_no_subjects_that_no_service_can_have(subject: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"users\.a\.{key}.*") as caught:
        parse(declare(key, subject), "services")
    assert not subject or repr(subject) in str(caught.value)
    if subject and subject not in MALFORMED:
        assert "'weather.get'" in str(caught.value)


@pytest.mark.parametrize("subject", OTHERS)
def test_a_user_may_ask_agents_of_other_namespaces_but_offers_nothing_there(subject: str) -> None:
    assert parse(declare("requests", subject), "services").users["a"].requests == (subject,)
    with pytest.raises(ConfigurationError, match="users.a.offers.*is a subject of natsrt, or includes some: those are"):
        parse(declare("offers", subject), "services")


@pytest.mark.parametrize("key", ["requests", "offers"])
def test_a_declaration_has_no_inboxes_of_other_users(key: str) -> None:
    other = '[users.b]\nrole = "caller"\n[users.c]\nrole = "caller"\ninbox_prefix = "replies.c"\n'
    for subject in ("_INBOX_b.>", "replies.c.>", "replies.>", "replies.*.x"):
        with pytest.raises(ConfigurationError, match=f"users.a.{key}.* is a subject for replies, or includes some"):
            parse(declare(key, subject, other), "services")
    assert parse(declare(key, "replies.d", other), "services").users["a"]


@pytest.mark.parametrize("subject", FREE)
@pytest.mark.parametrize("key", ["requests", "offers"])
def test_a_declaration_has_all_others(subject: str, key: str) -> None:
    assert getattr(parse(declare(key, subject), "services").users["a"], key) == (subject,)


@pytest.mark.parametrize("subject", NATSRTS + OTHERS + INBOXES + SERVERS + MALFORMED + FREE)
def test_what_a_service_takes_its_user_can_declare(subject: str) -> None:
    def taken(by: object) -> bool:
        try:
            assert callable(by) and by()
        except ValueError:
            return False
        return True

    options = Options(namespace="ns", inbox_prefix="_INBOX_own")
    declared = taken(lambda: parse(declare("offers", subject), "services"))
    assert taken(lambda: checked_service_subject(subject, options)) is declared is (subject in FREE)


@pytest.mark.parametrize(("role", "key"), [("caller", "offers"), ("publisher", "requests"), ("operator", "offers")])
def test_roles_without_services_have_no_such_list(role: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        parse(f'[users.a]\nrole = "{role}"\n{key} = ["a"]', "services")


# -- subscriptions of a runtime ----------------------------------------------------------------------------------------


async def ignore(message: PlainMessage) -> None:
    pass


@pytest.mark.parametrize("subject", NATSRTS + OTHERS + INBOXES + MALFORMED)
async def test_a_plain_subscription_reads_neither_inboxes_nor_messages_of_natsrt(subject: str) -> None:
    runtime = NatsAgentRuntime(namespace="ns", inbox_prefix="_INBOX_own")
    with pytest.raises(ValueError, match="subject") as caught:
        await runtime.subscribe_plain(subject, ignore)
    assert repr(subject) in str(caught.value)
    assert list(runtime._plain) == []


@pytest.mark.parametrize("subject", ["$JS.EVENT.ADVISORY.>", "$SRV.PING", "$SYS.ACCOUNT.>", *FREE])
async def test_a_plain_subscription_may_have_all_others(subject: str) -> None:
    runtime = NatsAgentRuntime(namespace="ns", inbox_prefix="_INBOX_own")
    assert (await runtime.subscribe_plain(subject, ignore)).subject == subject
