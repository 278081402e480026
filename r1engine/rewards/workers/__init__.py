"""Killable processes that compute what may take any time or memory."""
