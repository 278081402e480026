"""FAKE, see the package."""
