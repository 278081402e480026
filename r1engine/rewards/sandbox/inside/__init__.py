"""The files that run inside the sandbox; standard library only, as that is all there is."""
