"""From a mask to the rectangles of queries x keys that are computed: lanes, strips, a schedule, and what it costs."""
