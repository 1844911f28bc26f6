"""Running compiled attention: checked inputs, the reference, the lowerings."""
