"""`python -m fedsample` is the `fedsample` command."""

from __future__ import annotations

from fedsample.cli.main import main

if __name__ == "__main__":
    main()
