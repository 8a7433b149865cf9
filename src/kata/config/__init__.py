"""Settings with their origin: configuration files in Kata's places and with its keys, and pod annotations."""
