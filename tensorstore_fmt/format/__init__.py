"""The spec as code: bytes in, bytes out; no I/O, no clock."""
