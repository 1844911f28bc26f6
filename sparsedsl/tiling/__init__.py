"""From a mask to the rectangles of queries x keys that are computed: residue classes, strips, a schedule, and what it costs."""
