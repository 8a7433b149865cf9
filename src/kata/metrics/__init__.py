"""What is measured: the families of metrics, how they are written and read, and where the figures come from."""
