"""What several examples share. Each file beside this folder is a story of its own; none of these is."""
