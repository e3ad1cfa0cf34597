"""The version of fedsample."""

__version__ = "0.1.0"
