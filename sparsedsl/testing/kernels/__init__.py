"""The test kit for attention kernels that are not ours: a function on q, k and v is held against what it says that it implements.

The stages, in the order in which a check goes through them: ``declaration`` (what a kernel claims), ``kernel_case`` and ``drawing`` (what
it is called with), ``values`` and ``arena`` (what the tensors hold and where they lie), ``calling`` (one call), ``oracle`` and
``tolerance`` (what it must give, and how far off each element may be), ``*_properties`` (what must hold), ``shrinking`` and ``locating``
(the smallest case, and a guess at the fault), ``kernel_report``, ``kernel_check`` (all of it).
"""
