"""The race: losses beside torch's own, the bare matrix products and installed peers; its measures and its results."""
