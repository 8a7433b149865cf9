"""``kata-agent-ctl``: the agent's protocol from the command line (docs/kata-agent-ctl.md)."""
