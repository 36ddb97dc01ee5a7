"""A user's program with one error in each line that says so. A type checker must report these lines, and no others."""

from autogen_core import AgentId, RoutedAgent, SingleThreadedAgentRuntime

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime, Options


class Plain(RoutedAgent):
    pass


NatsAgentRuntime(call_timout=5)  # error
NatsAgentRuntime(servers=4222)  # error
NatsAgentRuntime(call_timeout="soon")  # error
NatsAgentRuntime(connect_timeout="none")  # error
NatsAgentRuntime(max_pings_out=2.5)  # error
NatsAgentRuntime(tls_first="yes")  # error
NatsAgentRuntime(creds=b"billing.creds")  # error
NatsAgentRuntime(user=1)  # error
NatsAgentRuntime(password=b"p")  # error
NatsAgentRuntime(keyed={"counter": 1})  # error
NatsAgentRuntime("nats://a", "billing")  # error
NatsAgentRuntime(options={"name": "billing"})  # error
Options(timeout=5)  # error
Options(name=b"w")  # error
Options.load(call_timeout=[5])  # error
Options().replace(namespce="n")  # error
Options().call_timeout = 5  # error
KeyedOptions(save="sometimes")  # error
natsrt.keyed(idle_timeout="1m")  # error
natsrt.create_distributed_runtime(broker=1)  # error
natsrt.runtime_of(SingleThreadedAgentRuntime())  # error


async def use(runtime: NatsAgentRuntime, agent: AgentId) -> None:
    await runtime.send_message("hi", "counter")  # error
    await runtime.send_message("hi", agent, reply_type=str, timeout="5")  # error
    await runtime.send_message("hi", agent, reply_type="str")  # error
    (await runtime.send_message("hi", agent, reply_type=str)).append("x")  # error
    await natsrt.register(SingleThreadedAgentRuntime(), Plain, "plain", lambda: Plain("p"))  # error
    await natsrt.register(runtime, Plain, "plain", Plain("p"))  # error
    await runtime.register_factory("plain", lambda: 1)  # error
    await runtime.wait_for("plain", timeout="5")  # error
