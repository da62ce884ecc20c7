"""From files of text to batches of token ids: tokenizer, documents, shards, order, stream. Imports no torch."""
