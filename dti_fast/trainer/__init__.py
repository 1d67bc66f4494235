"""The training run: configuration, loop, checkpoints, monitoring, previews."""
