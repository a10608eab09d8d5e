"""What the commands understand, one module for each. Standard library only, so that `--help` and bad arguments answer
at once."""
