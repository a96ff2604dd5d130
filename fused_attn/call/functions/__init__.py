"""Score and mask functions in plain Python: traced once, and made the functions, slopes and operands that backends run."""
