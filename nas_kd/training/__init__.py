"""Teacher, views, losses and the loop; knows nothing of blocks and genotypes."""
