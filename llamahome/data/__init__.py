"""From data files to batches: formats, templates, the token store, the order of samples, micro-batches."""
