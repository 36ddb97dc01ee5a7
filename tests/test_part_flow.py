"""The flow of parts of a stream, explored with random schedules in which messages are lost, late and repeated."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import pytest

from natsrt.wire.part_flow import PartsReceived, PartsSent, Progress, Window

LATE = 4.0


class World:
    """A worker that sends ``count`` parts, a caller that takes them, and what is on its way between them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.window = Window(self.random.choice([1, 2, 3, 8]), self.random.choice([1, 10, 40, 1000]))
        self.sizes = [self.random.choice([0, 1, 5, 30]) for _ in range(self.random.randint(0, 30))]
        self.loss = self.random.choice([0.0, 0.05, 0.3])
        self.sent, self.received = PartsSent(self.window), PartsReceived[int](self.window)
        self.to_caller: deque[bytes | int] = deque()
        self.to_worker: deque[Progress] = deque()
        self.taken: list[int] = []
        self.now = 0.0
        self.resent = 0
        self.ended = False
        self.reconnects = True

    def lose(self, link: deque[object]) -> None:
        """What is on its way is lost, as when a connection is cut."""
        if link and self.random.random() < self.loss:
            for _ in range(self.random.randint(1, len(link))):
                link.popleft()

    def tell(self) -> None:
        self.to_worker.append(self.received.progress())

    def send_again(self, numbers: Iterable[int]) -> None:
        bodies = (self.sent.sent_again(number, self.now) for number in numbers)
        self.to_caller.extend(body for body in bodies if body is not None)

    def step(self) -> None:
        self.now += self.random.choice([0.0, 0.1, 1.0])
        match self.random.randrange(6):
            case 0 | 1 if self.sent.sent < len(self.sizes) and self.sent.has_room:
                size = self.sizes[self.sent.sent]
                number = self.sent.add(f"{self.sent.sent + 1}".encode(), size, self.now)
                self.to_caller.append(str(number).encode())
            case 2 if self.to_caller:
                arrived = self.to_caller.popleft()
                if isinstance(arrived, int):
                    self.received.end(arrived)
                else:
                    number = int(arrived)
                    self.received.receive(number, number, self.sizes[number - 1])
                    if self.random.random() < 0.1:
                        self.received.receive(number, number, self.sizes[number - 1])
            case 3 if self.received.has_next:
                self.taken.append(self.received.take())
            case 4 if self.to_worker:
                progress = self.to_worker.popleft()
                again = list(self.sent.told(progress, self.now, LATE))
                self.resent += len(again)
                self.send_again(again)
                if self.random.random() < 0.1:
                    self.to_worker.append(progress)  # it comes again, late
            case 5 if self.reconnects and self.random.random() < 0.3:  # one of the two connects again
                if self.random.random() < 0.5:
                    self.send_again(self.sent.lost(self.now))
                else:
                    self.to_worker.append(self.received.progress(some_lost=True))
            case 5:
                self.lose(self.to_caller)  # type: ignore[arg-type]
                self.lose(self.to_worker)  # type: ignore[arg-type]
                if self.sent.sent == len(self.sizes):
                    self.ended = True
                    self.to_caller.append(len(self.sizes))  # a reply is repeated until it arrives
        if self.received.is_news:
            self.tell()
        self.check()

    def check(self) -> None:
        assert self.taken == list(range(1, len(self.taken) + 1))
        ahead = self.sent.sent - len(self.taken)
        assert ahead <= self.window.items
        assert sum(self.sizes[len(self.taken) + 1 : self.sent.sent]) <= self.window.size + max([0, *self.sizes])
        assert self.sent.consumed <= self.sent.have <= self.received.have


@pytest.mark.parametrize("first_seed", range(0, 3000, 250))
def test_every_part_arrives_once_and_in_order_whatever_gets_lost(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 250):
        world = World(seed)
        for steps in range(200_000):
            if world.received.is_complete and not world.received.has_next:
                break
            world.step()
            if steps % 20 == 0:
                world.tell()  # as the caller does when nothing comes
        assert world.taken == list(range(1, len(world.sizes) + 1)), f"seed {seed}"
        world.tell()
        assert not list(world.sent.told(world.to_worker[-1], world.now, LATE)), f"seed {seed}"
        assert world.sent.is_received and not world.sent._kept, f"seed {seed}"


def test_without_losses_nothing_is_sent_again() -> None:
    for seed in range(300):
        world = World(seed)
        world.loss, world.reconnects = 0.0, False
        while not world.received.is_complete or world.received.has_next:
            world.now -= 1.0  # no part is ever late
            world.step()
        assert world.resent == 0, f"seed {seed}"


def test_a_part_larger_than_the_window_is_sent_alone() -> None:
    sent = PartsSent(Window(100, 10))
    assert sent.has_room
    sent.add(b"x" * 50, 50, 0.0)
    assert not sent.has_room
    list(sent.told(Progress(1, 1), 0.0, 1.0))
    assert sent.has_room and not sent._kept


def test_exactly_the_gap_is_asked_for_once() -> None:
    received = PartsReceived[str](Window(10, 1000))
    for number in (1, 4, 5):
        received.receive(number, str(number), 1)
    assert received.is_news and received.progress() == Progress(0, 1, (2, 3))
    assert not received.is_news
    received.receive(2, "2", 1)
    assert not received.is_news  # the rest of the gap is on its way
    received.receive(7, "7", 1)
    assert not received.is_news
    received.receive(3, "3", 1)
    assert received.is_news and received.progress() == Progress(0, 5, (6, 6))
    received.receive(6, "6", 1)
    received.end(7)
    assert received.is_complete and [received.take() for _ in range(7)] == ["1", "2", "3", "4", "5", "6", "7"]


def test_a_gap_that_is_filled_part_by_part_is_sent_again_once() -> None:
    sent, received = PartsSent(Window(1000, 100_000)), PartsReceived[int](Window(1000, 100_000))
    for number in range(1, 401):
        sent.add(b"%d" % number, 1, 0.0)
    link = deque([1, *range(302, 401)])  # 2 to 301 were lost
    resent = 0
    while link:
        number = link.popleft()
        received.receive(number, number, 1)
        if received.is_news:
            again = list(sent.told(received.progress(), 1.0, LATE))
            resent += len(again)
            link.extend(again)
    assert received.have == 400 and resent == 300


def test_what_has_arrived_before_its_turn_comes_is_not_sent_again() -> None:
    sent = PartsSent(Window(10, 1000))
    for number in range(1, 4):
        sent.add(b"%d" % number, 1, 0.0)
    again = list(sent.lost(1.0))
    assert again == [1, 2, 3] and sent.sent_again(1, 1.0) == b"1"
    list(sent.told(Progress(0, 2), 2.0, LATE))
    assert sent.sent_again(2, 2.0) is None and sent.sent_again(3, 5.0) == b"3"
    assert list(sent.told(Progress(0, 2), 8.0, LATE)) == []  # it was sent again 3 s ago


def test_what_a_caller_says_wrongly_does_no_harm() -> None:
    sent = PartsSent(Window(4, 1000))
    for number in range(1, 4):
        sent.add(str(number).encode(), 1, 0.0)
    for wrong in (Progress(9, 9), Progress(-1, -5, (-7, 90)), Progress(2, 1, (3, 2)), Progress(0, 0, (50, 60))):
        assert list(sent.told(wrong, 0.0, 1.0)) == []
    assert (sent.have, sent.consumed) == (3, 3)


def test_parts_beyond_the_window_are_not_kept() -> None:
    received = PartsReceived[str](Window(2, 1000))
    assert not received.receive(3, "3", 1)
    assert received.receive(2, "2", 1) and received.receive(1, "1", 1)
    assert received.take() == "1" and received.receive(3, "3", 1)


def test_exactly_the_missing_parts_are_sent_again() -> None:
    sent = PartsSent(Window(10, 1000))
    for number in range(1, 7):
        sent.add(str(number).encode(), 1, 0.0)
    assert list(sent.told(Progress(0, 1, (2, 3)), 1.0, 5.0)) == [2, 3]
    assert list(sent.told(Progress(0, 3), 5.1, 5.0)) == [4, 5, 6]  # they are late
    assert list(sent.told(Progress(0, 3), 5.2, 5.0)) == []  # they are on their way
    assert list(sent.lost(6.0)) == [4, 5, 6]
