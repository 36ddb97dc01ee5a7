"""AutoGen AgentChat over natsrt: `natsrt.contrib.agentchat` under a shorter name. It needs the extra `agentchat`.

See docs/agentchat.md.
"""

try:
    import autogen_agentchat as _  # noqa: F401
except ImportError as _missing:
    raise ImportError("natsrt.agentchat needs AutoGen AgentChat: pip install 'natsrt[agentchat]'") from _missing

from natsrt.contrib.agentchat import RemoteChatAgent, RemoteTeam, host, team_runtime

__all__ = ["RemoteChatAgent", "RemoteTeam", "host", "team_runtime"]
