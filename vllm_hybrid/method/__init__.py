"""The two papers in plain torch: merging (DyMU), pruning (FastV), and which rows of a step they leave."""
