"""The only place that knows there is more than one process."""
