"""What a sandbox gets of the host: the sizing formula."""
