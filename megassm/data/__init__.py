"""From files of text to batches of token ids. Imports no torch.

documents -> tokenizer -> parts -> prepare -> shards      once, by tools/prepare_data.py
shards -> blocks -> order -> stream                       in every run
"""
