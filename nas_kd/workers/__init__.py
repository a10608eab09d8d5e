"""Many processes and machines on one study."""
