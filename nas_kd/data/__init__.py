"""Which images, from where, in which form; knows no network."""
