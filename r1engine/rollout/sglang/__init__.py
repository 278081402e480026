"""Generation by SGLang servers over HTTP, with verified in-place weight refresh. SGLang itself is never imported."""
