"""The version of the library; the format's version is another number (`format/layout.py`)."""

__version__ = "0.1.0"
