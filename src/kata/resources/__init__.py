"""The host's resources for a sandbox: sizing, cgroups, device rules and OOM scores."""
