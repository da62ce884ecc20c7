"""A run as people look at it: live in a terminal, on a page beside others. Reads run directories, writes none."""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its cache of fonts while it is imported
