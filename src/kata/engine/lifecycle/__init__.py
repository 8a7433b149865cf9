"""A sandbox from its start to its end: its states, its machine, its size, and when its engine ends."""
