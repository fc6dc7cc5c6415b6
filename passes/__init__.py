"""Graph passes: the batch-axis analysis and the rewrites that make a step private."""
