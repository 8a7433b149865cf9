"""What an engine answers by ttRPC: the Task API, containerd's Sandbox API and our own; and what it reports."""
