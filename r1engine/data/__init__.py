"""Questions and texts: read, checked, rendered, streamed."""
