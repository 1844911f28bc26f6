"""Everything between generated Triton source and a launch: targets, ahead-of-time builds, resources, tile sizes, autotuning."""
