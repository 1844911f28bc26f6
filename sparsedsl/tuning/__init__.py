"""What is measured once and remembered: the store on disk, and the speed of this machine. The store loads no torch."""
