"""What can be known about a pattern before it runs: tile lists, cost, causality, equality. Loads torch when its parts are used."""
