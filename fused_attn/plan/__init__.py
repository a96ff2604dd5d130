"""How a call is made by the kernels: ``problem`` is the call as schedules see it, ``forward``, ``backward`` and
``inspection`` hold the steps that make its results, and ``schedules`` is the table from which a call takes its steps.

Steps are a generator. It yields launches and does what torch does between them, and returns the results. Whoever takes its
launches runs them (``execution``), compiles them on tensors without storage (``offline``), times them or describes them.
"""
