"""What an engine carries between the host's network and the guest's: addresses, connections, names."""
