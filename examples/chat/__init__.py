"""A web page on which several people talk to a team of agents, whose members live in three worker processes.

Run it in a checkout: ``pip install '.[server,examples]'``, then ``python -m examples.chat``. It prints the URL of the
page. Open it in two windows, under two names. Ctrl-C ends everything. It needs no model: the answers are from a script.

- Each room, the last part of the URL, is a conversation of its own: a session of the team, which is its key.
- The words of an answer come as they are made, to all people in the room.
- Before a text is published, the team asks the people. Anyone may approve or refuse, and all see who it was.
- What has been said is kept in JetStream, and so is the state of the agents: reload the page, or kill a worker, the web
  server or the NATS server with ``kill -9``. The page says what happened, and the conversation goes on.

The parts, each a process of its own::

    browsers ── web, rooms         the page, and the rooms that are open: RemoteTeam
                   │ NATS
                workers (3)        the team, in each worker: RoundRobinGroupChat of three RemoteChatAgents
                   │ NATS          and the transcripts of the rooms: a keyed agent
                workers (3)        the writer in the first, the editor in the second, the publisher in the third

``team`` has the agents, ``script`` what they say, ``messages`` what is sent beside AutoGen's own messages, and
``__main__`` starts the processes.

Options: ``--port``, ``--data-dir`` to keep the conversations, and ``--model FILE`` for a real model: a JSON file with a
model client, as ``dump_component()`` of AutoGen's model clients makes it. If the variable NATS_URL is set, the server
there is used.

It has no log-in: people say who they are. All rooms of one web process are in its memory while they are open, so run
one web process.
"""
