"""Message definitions (`*.proto`), what `tools/protogen.py` makes of them (`*_pb.py`), and their codec."""
