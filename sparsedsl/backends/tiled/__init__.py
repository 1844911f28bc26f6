"""torch's dense products on the rectangles of a pattern: any device, forward and backward, compiles nothing."""
