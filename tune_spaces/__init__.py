"""Search spaces for `snscc sweep`, as short functions to read and to copy."""
