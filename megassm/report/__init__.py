"""A run as people look at it: live in a terminal, on a page beside others. Reads run directories, writes none."""
