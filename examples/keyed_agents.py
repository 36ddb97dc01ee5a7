"""Keyed agents: each account lives on one of three worker processes, with stored state. One process is killed.

Run it: python examples/keyed_agents.py
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime, UndeliveredCall, keyed

ACCOUNTS = [f"customer-{number}" for number in range(60)]


@dataclass
class Deposit:
    amount: int


@dataclass
class Balance:
    amount: int
    pid: int


@keyed
class Account(RoutedAgent):
    """One instance per customer over all workers. Its state is stored before each reply."""

    def __init__(self) -> None:
        super().__init__("keeps money")
        self.balance = 0

    @message_handler
    async def deposit(self, message: Deposit, ctx: MessageContext) -> Balance:
        self.balance += message.amount
        return Balance(self.balance, os.getpid())

    async def save_state(self) -> Mapping[str, Any]:
        return {"balance": self.balance}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.balance = state["balance"]


async def work(url: str) -> None:
    """A worker process. It runs until it gets a signal to stop."""
    async with NatsAgentRuntime(url) as runtime:
        await Account.register(runtime, "account", Account)
        print("ready", flush=True)
        await runtime.stop_when_signal()


async def start_worker(url: str) -> Process:
    worker = await asyncio.create_subprocess_exec(sys.executable, __file__, "work", url, stdout=PIPE)
    assert worker.stdout is not None and await worker.stdout.readline() == b"ready\n"
    return worker


async def deposit(runtime: NatsAgentRuntime, customer: str, amount: int) -> Balance | None:
    """Returns the new balance; None if the call failed: the deposit was then made once or not at all."""
    try:
        balance: Balance = await runtime.send_message(Deposit(amount), AgentId("account", customer))
    except UndeliveredCall:
        return None
    return balance


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as caller:
        workers = await asyncio.gather(*(start_worker(url) for _ in range(3)))
        try:
            rounds = [await asyncio.gather(*(deposit(caller, one, 1) for one in ACCOUNTS)) for _ in range(5)]
            homes = [
                {balance.pid for balance in balances if balance is not None} for balances in zip(*rounds, strict=True)
            ]
            assert all(len(pids) == 1 for pids in homes)
            print(f"300 deposits: 60 accounts, each in one of {len(set.union(*homes))} processes")

            more = [(one, asyncio.ensure_future(deposit(caller, one, 1))) for _ in range(5) for one in ACCOUNTS]
            await more[0][1]
            workers[0].kill()
            await workers[0].wait()
            acknowledged = Counter([one for one, attempt in more if await attempt is not None])
            final = {one: await deposit(caller, one, 0) for one in ACCOUNTS}
            assert {balance.pid for balance in final.values() if balance} == {worker.pid for worker in workers[1:]}
            print("one process was killed meanwhile: its accounts now live in the 2 others")
            print(f"of 300 more deposits {acknowledged.total()} were acknowledged")
            assert all(balance and 5 + acknowledged[one] <= balance.amount <= 10 for one, balance in final.items())
            print("each acknowledged deposit is in the balance, and no deposit is in it twice")
        finally:
            for worker in workers:
                if worker.returncode is None:
                    worker.terminate()
            await asyncio.gather(*(worker.wait() for worker in workers))


if __name__ == "__main__":
    asyncio.run(work(sys.argv[2]) if sys.argv[1:2] == ["work"] else main())
