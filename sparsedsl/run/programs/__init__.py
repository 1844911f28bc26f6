"""Programs on tensors: what a call gives, checked (``call``), the dense meaning of every node (``reference``), the fast ways (``lowered``)."""
