"""A miniature world and the text-to-image model trained on it."""
