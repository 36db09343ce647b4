"""The commands that ask something of a finished run."""
