"""The dense meaning of patterns and programs, in plain torch: what every other backend is compared with."""
