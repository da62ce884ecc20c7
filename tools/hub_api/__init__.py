"""What users of transformers do with any causal language model, as checks that say nothing of the model's kind.

A check takes a `Subject` and raises where what it does fails, or has another result than the library promises. The
command is tools/check_hub_api.py.
"""
