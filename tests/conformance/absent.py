"""What a test that needs something that is not installed raises and skips by."""


class Absent(Exception):
    """The layer class, or the model class, does not exist in the installed packages."""
