"""For programs that Python starts without its usual path (``-IS``): what they import is found after this import."""

import os
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_root = os.path.dirname(TESTS)
_version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
_places = (os.path.join(_root, "src"), os.path.join(_root, ".venv", "lib", _version, "site-packages"))
sys.path.extend(place for place in _places if place not in sys.path)
