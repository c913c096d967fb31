"""Integrity: whether the bytes of a model are those that were written, and hold numbers.

`check` reads all of them; what every operation looks at as it opens and reads is in `holes.py`
and in surgery/pages.py. `digests.py` has the SHA-256 of files, and the file that holds them.
"""
