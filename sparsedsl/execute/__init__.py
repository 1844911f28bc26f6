"""From patterns and programs to callables: compile, check, choose a backend, run node by node, explain."""
