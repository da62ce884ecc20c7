"""From files of text, or shards made elsewhere, to a data set."""
