"""``python -m fastencoder``: the same as the ``fastencoder`` command, for a checkout that is not installed."""

from fastencoder.cli import main

if __name__ == "__main__":
    main()
