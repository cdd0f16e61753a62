"""The training path: step, cut, optimizer, checkpoint."""
