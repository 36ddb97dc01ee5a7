"""AutoGen AgentChat over natsrt: agents and teams that live on workers, in any process. It needs the extra `agentchat`.

`host` makes an agent or a team available, and `RemoteChatAgent` and `RemoteTeam` are used in its place::

    RemoteChatAgent (chat_agent)   RemoteTeam (team)      in the process that uses it
              └───────── RemoteComponent ───────┘         what they share (remote_component)
                             Remote (remote)              who it is: announcement, message_types, components
                            Session (session)             its turns, again after a lost worker: repeats
                                  │ requests
                         Conversation (conversation)      at the worker: one keyed agent for each session
                            SessionFactory (factory)      and what host was given

`team_runtime` is for teams whose agents are all in this process. See docs/agentchat.md.
"""

from natsrt.contrib.agentchat.chat_agent import RemoteChatAgent
from natsrt.contrib.agentchat.hosting import host
from natsrt.contrib.agentchat.team import RemoteTeam
from natsrt.contrib.agentchat.team_runtime import team_runtime

__all__ = ["RemoteChatAgent", "RemoteTeam", "host", "team_runtime"]
