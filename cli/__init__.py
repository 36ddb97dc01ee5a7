"""The command line of natsrt: one module per command group."""
