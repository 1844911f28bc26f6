"""From patterns to source text: a text writer, expressions as torch code, whole modules for each lowering. No analysis here."""
