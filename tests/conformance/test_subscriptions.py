"""``add_subscription`` and ``remove_subscription``, by whomever."""

from __future__ import annotations

import pytest
from autogen_core import AgentId, TopicId, TypePrefixSubscription, TypeSubscription

from natsrt.errors import UnknownSubscription
from tests.conformance.conftest import MakeRuntime, World, natsrt_only, two_runtimes
from tests.conformance.samples import Recorder, Seen, Text, contents

NEWS = TopicId("news", "k")


async def test_a_subscription_takes_effect_until_it_is_removed(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    subscription = TypeSubscription("news", "recorder")
    for n in range(3):
        await world.host.add_subscription(subscription)
        await world.caller.publish_message(Text(f"in {n}"), NEWS)
        await world.idle()
        await world.host.remove_subscription(subscription.id)
        await world.caller.publish_message(Text(f"out {n}"), NEWS)
        await world.idle()
    assert contents(seen) == ["in 0", "in 1", "in 2"]


async def test_an_equal_subscription_is_refused(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    await world.host.add_subscription(TypeSubscription("news", "recorder", id="one"))
    with pytest.raises(ValueError, match="already exists"):
        await world.host.add_subscription(TypeSubscription("news", "recorder"))
    with pytest.raises(ValueError, match="already exists"):
        await world.host.add_subscription(TypeSubscription("other", "recorder", id="one"))


async def test_an_unknown_subscription_cannot_be_removed(world: World) -> None:
    with pytest.raises(ValueError, match="subscription|Subscription") as raised:
        await world.caller.remove_subscription("nothing")
    if world.is_natsrt:
        assert isinstance(raised.value, UnknownSubscription)
        assert raised.value.subscription_id == "nothing"


@two_runtimes
async def test_a_runtime_that_does_not_host_the_type_may_add_and_remove_a_subscription(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    for subscription in (TypeSubscription("news", "recorder"), TypePrefixSubscription("ne", "recorder")):
        await world.caller.add_subscription(subscription)
        await world.caller.publish_message(Text("in"), NEWS)
        await world.idle()
        await world.caller.remove_subscription(subscription.id)
        await world.caller.publish_message(Text("out"), NEWS)
        await world.idle()
    assert contents(seen) == ["in", "in"]


@two_runtimes
async def test_what_a_runtime_without_the_type_added_another_may_remove(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    subscription = TypeSubscription("news", "recorder")
    await world.caller.add_subscription(subscription)
    await world.host.remove_subscription(subscription.id)
    await world.caller.publish_message(Text("out"), NEWS)
    await world.idle()
    assert seen == []


@two_runtimes
async def test_a_subscription_added_before_its_type_is_hosted_counts_from_then_on(world: World) -> None:
    seen: list[Seen] = []
    subscription = TypeSubscription("news", "recorder")
    await world.caller.add_subscription(subscription)
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.caller.publish_message(Text("in"), NEWS)
    await world.idle()
    await world.caller.remove_subscription(subscription.id)
    await world.caller.publish_message(Text("out"), NEWS)
    await world.idle()
    assert contents(seen) == ["in"]


@natsrt_only
async def test_a_subscription_added_before_its_own_runtime_hosts_the_type_can_be_removed(world: World) -> None:
    seen: list[Seen] = []
    subscription = TypeSubscription("news", "recorder")
    await world.host.add_subscription(subscription)
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    await world.caller.publish_message(Text("in"), NEWS)
    await world.idle()
    await world.host.remove_subscription(subscription.id)
    await world.caller.publish_message(Text("out"), NEWS)
    await world.idle()
    assert contents(seen) == ["in"]


@two_runtimes
async def test_a_subscription_of_one_worker_counts_for_every_worker_of_the_type(world: World) -> None:
    seen: list[Seen] = []
    for runtime in (world.host, world.caller):
        await Recorder.register(runtime, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(TypeSubscription("news", "recorder"))
    for n in range(200):
        await world.caller.publish_message(Text(str(n)), NEWS)
    await world.idle()
    assert sorted(contents(seen), key=int) == [str(n) for n in range(200)]


@two_runtimes
async def test_a_subscription_that_two_workers_declare_ends_when_both_have_removed_it(world: World) -> None:
    seen: list[Seen] = []
    subscriptions = {}
    for runtime in (world.host, world.caller):
        await Recorder.register(runtime, "recorder", lambda: Recorder(seen))
        subscriptions[runtime] = TypeSubscription("news", "recorder")
        await runtime.add_subscription(subscriptions[runtime])
    for n, runtime in enumerate((world.host, world.caller, None)):
        for _ in range(20):
            await world.caller.publish_message(Text(str(n)), NEWS)
        await world.idle()
        if runtime is not None:
            await runtime.remove_subscription(subscriptions[runtime].id)
    assert contents(seen) == ["0"] * 20 + ["1"] * 20


@two_runtimes
async def test_a_worker_that_stops_takes_its_subscriptions_along(world: World) -> None:
    seen: list[Seen] = []
    for runtime in (world.host, world.caller):
        await Recorder.register(runtime, "recorder", lambda: Recorder(seen))
    await world.host.add_subscription(TypeSubscription("news", "recorder"))
    await world.host.stop()
    await world.caller.publish_message(Text("out"), NEWS)
    await world.caller.running.wait_idle()
    assert seen == []


@natsrt_only
@pytest.mark.parametrize("hosts", [True, False], ids=["hosting the type", "not hosting the type"])
async def test_a_subscription_removed_while_stopped_is_gone_after_the_next_start(
    world: World, make_runtime: MakeRuntime, hosts: bool
) -> None:
    seen: list[Seen] = []
    adder = make_runtime()
    await Recorder.register(adder if hosts else world.host, "recorder", lambda: Recorder(seen))
    await adder.start()
    subscription = TypeSubscription("news", "recorder")
    await adder.add_subscription(subscription)
    await adder.stop()
    await adder.remove_subscription(subscription.id)
    await adder.start()
    await world.caller.publish_message(Text("out"), NEWS)
    await world.idle()
    await adder.running.wait_idle()
    assert seen == []


@natsrt_only
async def test_a_type_registered_while_stopped_takes_over_the_subscriptions_added_before(
    world: World, make_runtime: MakeRuntime
) -> None:
    seen: list[Seen] = []
    adder = make_runtime()
    await adder.start()
    subscription = TypeSubscription("news", "recorder")
    await adder.add_subscription(subscription)
    await adder.stop()
    await Recorder.register(adder, "recorder", lambda: Recorder(seen))
    await adder.start()
    await world.caller.publish_message(Text("in"), NEWS)
    await world.idle()
    await adder.running.wait_idle()
    await adder.remove_subscription(subscription.id)
    await world.caller.publish_message(Text("out"), NEWS)
    await world.idle()
    await adder.running.wait_idle()
    assert contents(seen) == ["in"]


@two_runtimes
async def test_an_event_published_right_after_a_subscription_was_added_elsewhere_is_not_missed(world: World) -> None:
    seen: list[Seen] = []
    await Recorder.register(world.host, "recorder", lambda: Recorder(seen))
    for n in range(100):
        await world.caller.add_subscription(TypeSubscription(f"news{n}", "recorder"))
        await world.caller.publish_message(Text(str(n)), TopicId(f"news{n}", "k"))
    await world.idle()
    assert contents(seen) == [str(n) for n in range(100)]
    assert {one.agent for one in seen} == {AgentId("recorder", "k")}


@natsrt_only
async def test_a_subscription_that_no_subject_can_express_is_refused_and_spoils_nothing(world: World) -> None:
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    for runtime in (world.host, world.caller):
        with pytest.raises(ValueError, match="1,?024|bytes"):
            await runtime.add_subscription(TypeSubscription("a." * 600 + "a", "recorder"))
        await runtime.add_subscription(TypeSubscription(f"short{id(runtime)}", "recorder"))
        break
    assert (await world.caller.send_message(Text("still"), AgentId("recorder", "k"))).content == "k got still"
