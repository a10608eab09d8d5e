"""What is kept on the disk: whole or not at all, named by what it depends on, checked when it is read."""
