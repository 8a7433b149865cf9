"""``kata-log-parser``: reads, merges, checks and converts logs of engines, agents, containerd and journald."""
