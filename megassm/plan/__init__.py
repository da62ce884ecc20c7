"""What a run needs of a cluster, before it is started."""
