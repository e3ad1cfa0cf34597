"""The `fedsample` command."""
