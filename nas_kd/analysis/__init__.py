"""What a base is: labels of its channels, blocks, choices; from one forward pass."""
