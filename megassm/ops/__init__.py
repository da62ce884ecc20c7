"""Functions of tensors: no knobs, no modules, no ranks."""
