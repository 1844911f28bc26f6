"""The C++ that is the same for all patterns, as text: what generated code is compiled with, and the two passes that call it."""
