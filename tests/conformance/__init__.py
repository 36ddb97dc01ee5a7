"""The `AgentRuntime` protocol method by method, over several runtimes, and natsrt's lifecycle."""
