"""Standard streams of processes: where they come from and go to, logs, and logging programs."""
