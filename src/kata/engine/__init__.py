"""One engine process per sandbox: its containers, their processes and streams, its virtual machine."""
