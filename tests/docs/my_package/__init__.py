"""The package whose layers the documents register."""
