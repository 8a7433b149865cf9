"""``kata-agent-ctl``: calls an agent's methods from the command line (docs/kata-agent-ctl.md)."""
