"""When a pull is due, and what statuses mean: made-up statuses, and random schedules against a model."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from natsrt.jetstream.pull_plan import Ask, PullPlan, Verdict

MUCH = 1 << 30


def plan_with_a_pull(batch: int = 10, max_bytes: int = 100) -> PullPlan:
    plan = PullPlan(batch, max_bytes)
    assert plan.begin() == 0
    assert plan.ask(MUCH, MUCH) == Ask(batch, max_bytes)
    return plan


def test_the_next_pull_is_due_at_half() -> None:
    plan = plan_with_a_pull()
    for _ in range(4):
        plan.message()
        assert not plan.hungry
        assert plan.ask(MUCH, MUCH) is None
    plan.message()
    assert plan.hungry
    assert plan.ask(MUCH, MUCH) == Ask(5, 100)
    assert plan.outstanding == 10


@pytest.mark.parametrize(
    ("messages", "size", "ask"),
    [(0, MUCH, None), (MUCH, 0, None), (-1, MUCH, None), (3, MUCH, Ask(3, 100)), (MUCH, 30, Ask(10, 30))],
)
def test_a_pull_asks_for_what_there_is_room_for(messages: int, size: int, ask: Ask | None) -> None:
    plan = PullPlan(10, 100)
    plan.begin()
    assert plan.ask(messages, size) == ask


@pytest.mark.parametrize("status", [("408", "Request Timeout"), ("404", "No Messages"), ("409", "Batch Completed")])
def test_a_pull_that_ends_makes_room_for_another(status: tuple[str, str]) -> None:
    plan = plan_with_a_pull()
    plan.message()
    assert plan.status(*status, 9) is Verdict.GO_ON
    assert plan.outstanding == 0
    assert plan.ask(MUCH, MUCH) == Ask(10, 100)


def test_what_is_too_large_is_pulled_alone() -> None:
    plan = plan_with_a_pull()
    plan.message()
    assert plan.status("409", "Message Size Exceeds MaxBytes", 9) is Verdict.GO_ON
    assert plan.ask(MUCH, MUCH) == Ask(10, 100)  # the pull before may have been nearly full
    assert plan.status("409", "Message Size Exceeds MaxBytes", 10) is Verdict.GO_ON
    assert plan.ask(MUCH, 1) == Ask(1, None)
    plan.message()
    assert plan.ask(MUCH, MUCH) == Ask(10, 100)


def test_what_is_too_large_waits_until_other_pulls_have_ended() -> None:
    plan = plan_with_a_pull()
    for _ in range(5):
        plan.message()
    assert plan.ask(MUCH, MUCH) == Ask(5, 100)
    plan.status("409", "Message Size Exceeds MaxBytes", 5)
    assert plan.ask(MUCH, MUCH) is None
    plan.status("409", "Message Size Exceeds MaxBytes", 5)
    assert plan.ask(MUCH, MUCH) == Ask(1, None)


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        ("100", "Idle Heartbeat", Verdict.GO_ON),
        ("408", "Request Timeout", Verdict.RENEW),
        ("409", "Leadership Change", Verdict.RENEW),
        ("409", "Server Shutdown", Verdict.RENEW),
        ("423", "Nats-Wrong-Pin-Id", Verdict.RENEW),
        ("409", "Consumer Deleted", Verdict.CHECK),
        ("409", "Consumer is push based", Verdict.CHECK),
        ("409", "Exceeded MaxWaiting", Verdict.CHECK),
        ("409", "Exceeded MaxRequestBatch of 5", Verdict.CHECK),
        ("503", "", Verdict.CHECK),
        ("400", "Bad Request", Verdict.CHECK),
        ("", "", Verdict.CHECK),
    ],
)
def test_statuses_without_a_count(code: str, text: str, verdict: Verdict) -> None:
    assert plan_with_a_pull().status(code, text, None) is verdict


def test_a_leader_that_changes_ends_all_pulls() -> None:
    assert plan_with_a_pull().status("409", "Leadership Change", 3) is Verdict.RENEW


def test_two_missing_heartbeats_are_noticed() -> None:
    plan = plan_with_a_pull()
    plan.status("100", "Idle Heartbeat", None)
    assert [plan.tick() for _ in range(3)] == [False, False, True]
    plan.begin()
    plan.ask(MUCH, MUCH)
    assert [plan.tick() for _ in range(2)] == [False, True]


def test_messages_count_as_heartbeats() -> None:
    plan = plan_with_a_pull()
    for _ in range(5):
        plan.message()
        assert not plan.tick()


def test_without_an_open_pull_silence_says_nothing() -> None:
    plan = PullPlan(10, 100)
    plan.begin()
    assert not any(plan.tick() for _ in range(10))
    plan.ask(MUCH, MUCH)
    assert not plan.tick()
    assert plan.tick()


def test_generations_that_bring_nothing_begin_later_and_later() -> None:
    plan = PullPlan(10, 100)
    delays = [plan.begin() for _ in range(9)]
    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    plan.message()
    assert plan.begin() == 0


def test_a_status_that_refuses_brings_nothing() -> None:
    plan = plan_with_a_pull()
    plan.status("409", "Exceeded MaxWaiting", None)
    assert plan.begin() > 0


# -- random schedules ----------------------------------------------------------------------------------------------

BATCH, MAX_BYTES, ACK_WAIT, EXPIRES = 8, 100, 12, 9
"""The times are ticks."""


@dataclass
class OpenPull:
    generation: int
    batch: int
    left: int | None
    until: int


@dataclass
class Model:
    """A consumer at a server, in ticks. ``wire`` is what is on its way to the client, in order."""

    rng: random.Random
    now: int = 0
    sizes: list[int] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    unacknowledged: dict[int, int] = field(default_factory=dict)
    pulls: deque[OpenPull] = field(default_factory=deque)
    wire: deque[tuple[int, str, str, int | None, int | None]] = field(default_factory=deque)
    hung: bool = False
    faults: bool = True

    def store(self) -> None:
        size = self.rng.choice((10, 10, 30, 90, 150, 400))
        self.waiting.append(len(self.sizes))
        self.sizes.append(size)

    def pull(self, generation: int, ask: Ask) -> None:
        if self.faults and self.rng.random() < 0.03:
            self.say(generation, "409", "Exceeded MaxWaiting", None)
        elif not (self.faults and self.rng.random() < 0.02):  # that one is lost
            self.pulls.append(OpenPull(generation, ask.batch, ask.max_bytes, self.now + EXPIRES))

    def say(self, generation: int, code: str, text: str, pending: int | None) -> None:
        self.wire.append((generation, code, text, pending, None))

    def run(self) -> None:
        """Deliver what can be delivered, to the open pulls in turns."""
        while self.waiting and self.pulls and not self.hung:
            pull, number = self.pulls.popleft(), self.waiting[0]
            size = self.sizes[number]
            if pull.left is not None and size > pull.left:
                self.say(pull.generation, "409", "Message Size Exceeds MaxBytes", pull.batch)
                continue
            self.waiting.popleft()
            self.unacknowledged[number] = self.now + ACK_WAIT
            self.wire.append((pull.generation, "", "", None, number))
            pull.batch -= 1
            if pull.left is not None:
                pull.left -= size
            if pull.batch:
                self.pulls.append(pull)
            elif pull.left is not None:
                self.say(pull.generation, "409", "Batch Completed", 0)

    def tick(self) -> None:
        self.now += 1
        if self.hung:
            return
        for number in [n for n, until in self.unacknowledged.items() if until <= self.now]:
            del self.unacknowledged[number]
            self.waiting.append(number)
        for pull in [pull for pull in self.pulls if pull.until <= self.now]:
            self.pulls.remove(pull)
            self.say(pull.generation, "408", "Request Timeout", pull.batch)
        for pull in self.pulls:
            self.say(pull.generation, "100", "Idle Heartbeat", None)

    def cut(self) -> None:
        self.pulls.clear()
        self.wire.clear()


class Client:
    """Pulls as a plan says, and holds some messages before it acknowledges them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.plan = PullPlan(BATCH, MAX_BYTES)
        self.generation = 0
        self.held: list[int] = []
        self.acknowledged: set[int] = set()
        self.sent = 0
        self.rests = 0
        """Ticks until the present generation may pull."""
        self.exact = True
        """Whether nothing was lost in this generation, so that its messages can be counted."""
        self.begin()

    def begin(self) -> None:
        self.rests = int(self.plan.begin() * 2)
        self.generation += 1
        self.exact = True
        self.model.pulls = deque(pull for pull in self.model.pulls if pull.generation == self.generation)
        self.ask()

    def ask(self) -> None:
        if self.rests:
            return
        room = 500 - sum(self.model.sizes[number] for number in self.held)
        if (ask := self.plan.ask(12 - len(self.held), room)) is not None:
            self.sent += 1
            before = len(self.model.pulls) + len(self.model.wire)
            self.model.pull(self.generation, ask)
            self.exact &= len(self.model.pulls) + len(self.model.wire) > before

    def receive(self) -> None:
        generation, code, text, pending, number = self.model.wire.popleft()
        current = generation == self.generation
        if number is not None:
            if current:
                self.plan.message()
            self.held.append(number)
            if current and self.plan.hungry:
                self.ask()
        elif current:
            if self.plan.status(code, text, pending) is not Verdict.GO_ON:
                self.begin()
            elif self.plan.hungry:
                self.ask()

    def acknowledge(self) -> None:
        number = self.held.pop(self.model.rng.randrange(len(self.held)))
        self.model.unacknowledged.pop(number, None)
        if number in self.model.waiting:
            self.model.waiting.remove(number)
        self.acknowledged.add(number)
        if self.plan.hungry:
            self.ask()

    def tick(self) -> None:
        if self.rests:
            self.rests -= 1
        if self.plan.tick():
            self.begin()
        else:
            self.ask()

    def check(self) -> None:
        """What the plan counts is what the server has, and what is on its way."""
        open_pulls = sum(pull.batch for pull in self.model.pulls if pull.generation == self.generation)
        ending = sum(
            1 if number is not None else pending or 0
            for generation, code, _, pending, number in self.model.wire
            if generation == self.generation
        )
        assert 0 <= self.plan.outstanding <= BATCH
        refused = any(code == "409" and pending is None for _, code, _, pending, _ in self.model.wire)
        if self.exact and not refused:
            assert self.plan.outstanding == open_pulls + ending
        assert open_pulls <= BATCH


@pytest.mark.parametrize("seed", range(40))
def test_in_random_schedules_every_message_comes_and_pulls_do_not_pile_up(seed: int) -> None:
    rng = random.Random(seed)
    model = Model(rng)
    client = Client(model)
    for _ in range(400):
        step = rng.random()
        if step < 0.3:
            model.store()
        elif step < 0.6 and model.wire:
            client.receive()
        elif step < 0.75 and client.held:
            client.acknowledge()
        elif step < 0.95:
            model.tick()
            client.tick()
        elif step < 0.96:
            model.cut()
            client.exact = False
            if rng.random() < 0.5:  # it is told of the lost connection; else silence tells it
                client.begin()
        elif step < 0.98:
            model.hung = not model.hung
        model.run()
        client.check()
    model.faults = model.hung = False
    for _ in range(600):
        model.tick()
        client.tick()
        model.run()
        while model.wire or client.held:
            if model.wire:
                client.receive()
            if client.held:
                client.acknowledge()
            model.run()
            client.check()
        if len(client.acknowledged) == len(model.sizes):
            break
    assert client.acknowledged == set(range(len(model.sizes)))
    assert len(model.pulls) <= BATCH


def test_pulls_are_few_while_nothing_is_wrong() -> None:
    model = Model(random.Random(1), faults=False)
    client = Client(model)
    for _ in range(1_000):
        model.sizes.append(1)
        model.waiting.append(len(model.sizes) - 1)
        model.run()
        while model.wire:
            client.receive()
        while client.held:
            client.acknowledge()
        client.check()
    assert client.sent <= 1_000 / (BATCH / 2) + 1
